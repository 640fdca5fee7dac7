"""The back end "cuda_graph": the modules as they are, recorded as a CUDA graph for each shape.

The thousand launches of a call become one, which matters where the GPU would wait for Python. A shape is ready in about the time
of five calls, where a compiler takes minutes.
"""

from collections.abc import Mapping

from torch import Tensor

from engines.backends.exact_shapes import ExactShapes, Ready
from engines.backends.graphed_call import GraphedCall
from engines.errors import EngineError


class GraphEngine(ExactShapes):
    """For CUDA only."""

    name = "cuda_graph"

    def made_ready(self, buffers: Mapping[str, Tensor]) -> Ready:
        """See `ExactShapes`. Raises `EngineError` on another device."""
        if not self.on_cuda:
            raise EngineError(f"CUDA graphs need an NVIDIA GPU, and {self.call.name} runs on {buffers['latents'].device}")
        return GraphedCall(self.call.module, buffers, self.pool)
