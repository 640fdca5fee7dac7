"""What runs a UNet and for which shapes, as the operator sets it. No torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

BackEnd = Literal["eager", "cuda_graph", "inductor", "tensorrt"]
Plugin = Literal["temporal_attention"]


@dataclass(frozen=True)
class EngineConfig:
    """Which engine a replica makes ready before it is ready itself.

    back_end: "eager" runs the modules as they are; "cuda_graph" records them, which takes seconds at a start and an NVIDIA
    GPU; "inductor" compiles them with `torch.compile`, minutes at the first start; "tensorrt" builds plans or finds
    them in `folder`, and needs an NVIDIA GPU and the extras `gpu` and `tensorrt`. What cannot be prepared, or has another
    shape, runs eagerly, and the log says so.
    shapes: (frames of a call, height, width), in pixels; none means the endpoint's defaults.
    refit: a TensorRT plan takes the weights of any checkpoint, so that all of a model share it; loading exports the model again.
    plugins: operations that TensorRT plans run by our kernels, not TensorRT's; in half precision, and for `shapes` that share
    one number of frames. No GPU has run these yet: use `reelray engines verify` first.
    folder: of plans and of inductor's cache, private to this user; None is a folder in the service's home.
    """

    back_end: BackEnd = "eager"
    shapes: tuple[tuple[int, int, int], ...] = ()
    refit: bool = False
    plugins: tuple[Plugin, ...] = ()
    folder: Path | None = None

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        """Raises `ValueError` for numbers that cannot be."""
        if any(min(shape) < 1 or shape[1] % 8 or shape[2] % 8 for shape in self.shapes):
            raise ValueError("a shape is (frames, height, width), each at least 1 and sides in multiples of 8 pixels")
