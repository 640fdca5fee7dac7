"""What engines for exact shapes have in common: each shape is prepared beforehand, and no other can be run.

Preparing a shape takes seconds to minutes, so it never happens in a request.
"""

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict
from time import perf_counter

import torch
from torch import Tensor

from engines.backends.graphed_call import Pool
from engines.backends.shapes import Shape
from engines.backends.unet_call import Dims, UNetCall
from engines.errors import EngineError

logger = logging.getLogger(__name__)

Ready = Callable[[Mapping[str, Tensor]], Tensor]
"""A call at one shape, of inputs by name."""

_PREPARING = threading.Lock()
"""The compiler's state is the process's, and a process may record one CUDA graph at a time."""


class ExactShapes(ABC):
    """See `engines.backends.backend.Engine`. It runs on the device of the call's weights.

    pool: memory shared with other engines, if they all run in turn.
    """

    name: str

    def __init__(self, call: UNetCall, pool: Pool | None = None):
        self.call = call
        self.on_cuda = call.example["latents"].is_cuda
        self.pool = pool or (torch.cuda.graph_pool_handle() if self.on_cuda else None)
        self._ready: dict[Shape, Ready] = {}

    @abstractmethod
    def made_ready(self, buffers: Mapping[str, Tensor]) -> Ready:
        """The call for inputs of these sizes and strides, in `inference_mode`. Whatever fails raises `RuntimeError`."""

    def holds(self, shape: Shape) -> bool:
        """Whether `shape` was prepared."""
        return shape in self._ready

    @torch.inference_mode()
    def prepare(self, shape: Shape) -> None:
        """Makes this shape ready, and runs it.

        Raises `ValueError` for a shape that the UNet cannot take, `EngineError` with the cause if it fails.
        """
        buffers = self._buffers(shape)
        with _PREPARING, torch.cuda.device_of(buffers["latents"]):
            if shape in self._ready:
                return
            started = perf_counter()
            try:
                # What modules cache at their first call must exist before compilation: else compiled code would compute it, and
                # the new cache entry would cause another compilation.
                self.call.module(*buffers.values())
                self._ready[shape] = self.made_ready(buffers)
            except RuntimeError as exc:  # all of the compiler's own errors are, and CUDA's
                raise EngineError(f"{self.call.name} at {shape} could not be made ready for {self.name}: {exc}") from exc
            seconds = perf_counter() - started
        fields = {"engine": self.name, "call": self.call.name, "seconds": round(seconds, 1)} | asdict(shape)
        logger.info("a shape is ready", extra={"action": "shape_ready"} | fields)

    @torch.inference_mode()
    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """See `Engine`. Raises `EngineError` for a shape that was not prepared, `ValueError` for inputs of another call."""
        shape = self.call.shape_of(inputs)
        if shape not in self._ready:
            raise EngineError(f"{self.call.name} was not prepared for {shape}")
        with torch.cuda.device_of(self.call.example["latents"]):
            return self._ready[shape](inputs)

    def _buffers(self, shape: Shape) -> dict[str, Tensor]:
        """An input of every name, with the strides that the call will always see."""
        sizes, example = self.call.shapes(shape), self.call.example
        with torch.inference_mode(False):  # ordinary tensors, which may be written to in any mode
            return {name: _laid_out(example[name].new_zeros(size), self.call.dims[name]) for name, size in sizes.items()}


def _laid_out(tensor: Tensor, dims: Dims) -> Tensor:
    """Images (N, C, height, width) as the UNets have them, in channels-last memory; anything else contiguous."""
    images = len(dims) == 4 and all(isinstance(dim, str) for dim in dims[2:])
    return tensor.to(memory_format=torch.channels_last) if images else tensor
