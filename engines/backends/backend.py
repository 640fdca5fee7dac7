"""The interface of what runs a UNet call. Eager is the reference; others are prepared for some shapes and agree up to rounding.

A *back end* is a technique ("inductor"); an *engine* is one UNet call prepared by it.
"""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from engines.backends.shapes import Shape
from engines.backends.unet_call import UNetCall


class Engine(Protocol):
    """A UNet call that is ready to run on one device, by one thread at a time.

    name: "eager", "cuda_graph", "inductor" or "tensorrt": for the log and for the receipts of jobs.
    """

    name: str

    def holds(self, shape: Shape) -> bool:
        """Whether it runs calls of this shape."""
        ...

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """inputs: the call's, by name, on the device. The result, of the latents' shape, is the caller's to keep."""
        ...


class Eager:
    """The module itself, for every shape that it takes."""

    name = "eager"

    def __init__(self, call: UNetCall):
        self.call = call

    def holds(self, shape: Shape) -> bool:
        """See `Engine`."""
        return True

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """See `Engine`."""
        return self.call.module(*inputs.values())
