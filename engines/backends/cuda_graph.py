"""A UNet call as the modules run it, recorded as a CUDA graph for each shape.

The thousand launches of a call become one, which matters where the GPU would wait for Python. A shape is ready in about as long
as five calls take, so this engine costs a start nothing that a compiler's would.
"""

from collections.abc import Mapping

from torch import Tensor

from engines.backends.exact_shapes import ExactShapes, Ready
from engines.backends.graphed_call import GraphedCall
from engines.errors import EngineError


class GraphEngine(ExactShapes):
    """For CUDA alone."""

    name = "cuda_graph"

    def made_ready(self, buffers: Mapping[str, Tensor]) -> Ready:
        """See `ExactShapes`. Raises `EngineError` on another device."""
        if not self.on_cuda:
            raise EngineError(f"CUDA graphs need an NVIDIA GPU, and {self.call.name} runs on {buffers['latents'].device}")
        return GraphedCall(self.call.module, buffers, self.pool)
