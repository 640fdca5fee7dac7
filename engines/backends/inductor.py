"""The back end "inductor": a UNet call through `torch.compile`; on CUDA each shape becomes one CUDA graph.

The code is for one exact shape, since a compiler that knows the sizes chooses better kernels. That takes minutes at full size.
Kernels are timed on the GPU at hand, so we ship no compiled code; inductor's cache on disk saves the next process most of it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from engines.backends.exact_shapes import ExactShapes, Ready
from engines.backends.fixed_inputs import FixedInputs
from engines.backends.graphed_call import GraphedCall, Pool
from engines.backends.unet_call import UNetCall

_MOST_SHAPES = 64
"""How often one function is compiled before the compiler gives up; its default of 8 would count all calls of a UNet together."""


class InductorEngine(ExactShapes):
    """autotune: on CUDA, time Triton's and the libraries' kernels for every product and convolution; without it compiling takes
    a fraction of the time."""

    name = "inductor"

    def __init__(self, call: UNetCall, autotune: bool = True, pool: Pool | None = None):
        super().__init__(call, pool)
        self._autotune = autotune

    def made_ready(self, buffers: Mapping[str, Tensor]) -> Ready:
        """See `ExactShapes`."""
        mode = "max-autotune-no-cudagraphs" if self.on_cuda and self._autotune else "default"
        run: Any = torch.compile(self.call.module, mode=mode, dynamic=False, fullgraph=True)
        with torch._dynamo.config.patch(recompile_limit=_MOST_SHAPES):
            run(*buffers.values())
        return GraphedCall(run, buffers, self.pool) if self.on_cuda else _Buffered(run, buffers)


class _Buffered:
    """Compiled code without a graph. It always gets the strides that it was compiled for; others would compile it again."""

    def __init__(self, run: Callable[..., Tensor], buffers: Mapping[str, Tensor]):
        self._run, self._inputs = run, FixedInputs(buffers)

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        self._inputs.fill(inputs)
        return self._run(*self._inputs.tensors.values())
