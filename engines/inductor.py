"""A UNet call through `torch.compile`, for shapes that are made ready beforehand; on CUDA each becomes one CUDA graph.

Compiling takes minutes at full size, so it never happens in a request: `prepare` does it all, and a shape that was not prepared
is not held. The code is for one shape exactly, since a compiler that knows the sizes chooses better kernels. Kernels are timed on
the GPU at hand, so nothing is shipped; inductor's own cache on disk spares the next process most of it.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from engines.cuda_graph import GraphedCall, Pool
from engines.errors import EngineError
from engines.fixed_inputs import FixedInputs
from engines.shapes import Shape
from engines.unet_call import Dims, UNetCall

logger = logging.getLogger(__name__)

_COMPILING = threading.Lock()
"""The compiler's state is the process's, and a process may record one CUDA graph at a time."""

_MOST_SHAPES = 64
"""Compilations of one function before the compiler gives up; its own limit of 8 would count all calls of a UNet together."""


class InductorEngine:
    """See `engines.engine.Engine`. It runs on the device of the call's weights.

    autotune: on CUDA, time Triton's and the libraries' kernels for every product and convolution; without it compiling takes
    a fraction of the time. pool: memory shared with other engines, if they all run in turn.
    """

    name = "inductor"

    def __init__(self, call: UNetCall, autotune: bool = True, pool: Pool | None = None):
        self.call = call
        self._autotune = autotune
        self._on_cuda = call.example["latents"].is_cuda
        self._pool = pool or (torch.cuda.graph_pool_handle() if self._on_cuda else None)
        self._ready: dict[Shape, Callable[[Mapping[str, Tensor]], Tensor]] = {}

    def holds(self, shape: Shape) -> bool:
        """Whether `shape` was prepared."""
        return shape in self._ready

    @torch.inference_mode()
    def prepare(self, shape: Shape) -> None:
        """Compiles for this shape, runs it, and on CUDA records the graph.

        Raises `ValueError` for a shape that the UNet cannot take, `EngineError` with the compiler's words if it fails.
        """
        buffers = self._buffers(shape)
        with _COMPILING, torch.cuda.device_of(buffers["latents"]):
            if shape in self._ready:
                return
            started = perf_counter()
            try:
                # What modules keep at their first call shall be there before the compiler looks: else it would be computed by
                # the code, and its being there be a reason to compile again.
                self.call.module(*buffers.values())
                self._ready[shape] = self._compiled(buffers)
            except RuntimeError as exc:  # all of the compiler's own errors are, and CUDA's
                raise EngineError(f"{self.call.name} at {shape} did not compile: {exc}") from exc
            seconds = perf_counter() - started
        fields = {"engine": self.name, "call": self.call.name, "seconds": round(seconds, 1)} | asdict(shape)
        logger.info("compiled", extra={"action": "engine_compiled"} | fields)

    @torch.inference_mode()
    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """See `Engine`. Raises `EngineError` for a shape that was not prepared, `ValueError` for inputs of another call."""
        shape = self.call.shape_of(inputs)
        if shape not in self._ready:
            raise EngineError(f"{self.call.name} was not prepared for {shape}")
        with torch.cuda.device_of(self.call.example["latents"]):
            return self._ready[shape](inputs)

    def _compiled(self, buffers: Mapping[str, Tensor]) -> Callable[[Mapping[str, Tensor]], Tensor]:
        mode = "max-autotune-no-cudagraphs" if self._on_cuda and self._autotune else "default"
        run: Any = torch.compile(self.call.module, mode=mode, dynamic=False, fullgraph=True)
        with torch._dynamo.config.patch(recompile_limit=_MOST_SHAPES):
            run(*buffers.values())
        return GraphedCall(run, buffers, self._pool) if self._on_cuda else _Buffered(run, buffers)

    def _buffers(self, shape: Shape) -> dict[str, Tensor]:
        """An input of every name, of the strides with which the compiled code shall read it."""
        sizes, example = self.call.shapes(shape), self.call.example
        with torch.inference_mode(False):  # ordinary tensors, which may be written to in any mode
            return {name: _laid_out(example[name].new_zeros(size), self.call.dims[name]) for name, size in sizes.items()}


class _Buffered:
    """Compiled code without a graph. It sees the strides that it was compiled for, and with others would be compiled again."""

    def __init__(self, run: Callable[..., Tensor], buffers: Mapping[str, Tensor]):
        self._run, self._inputs = run, FixedInputs(buffers)

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        self._inputs.fill(inputs)
        return self._run(*self._inputs.tensors.values())


def _laid_out(tensor: Tensor, dims: Dims) -> Tensor:
    """Images (N, C, height, width) as the UNets have them, in channels-last memory; anything else contiguous."""
    images = len(dims) == 4 and all(isinstance(dim, str) for dim in dims[2:])
    return tensor.to(memory_format=torch.channels_last) if images else tensor
