"""A family of shapes as a TensorRT profile: the ranges of a UNet call's inputs."""

from collections.abc import Mapping
from dataclasses import dataclass

from engines.errors import EngineError
from engines.shapes import Shape, ShapeFamily
from engines.unet_call import UNetCall


@dataclass(frozen=True)
class Range:
    """The shapes of one input, as a TensorRT profile wants them."""

    smallest: tuple[int, ...]
    best: tuple[int, ...]
    largest: tuple[int, ...]


Profile = Mapping[str, Range]
"""A range for every input whose shape may change."""

ANIMATEDIFF = (
    ShapeFamily.fixed(16, 64, 64),  # the API's own
    ShapeFamily(Shape(16, 64, 64), Shape(16, 64, 96), Shape(16, 64, 96)),
    ShapeFamily(Shape(16, 64, 64), Shape(16, 96, 64), Shape(16, 96, 64)),
    ShapeFamily(Shape(8, 64, 64), Shape(16, 64, 64), Shape(32, 64, 64)),
)
"""16 frames at 512x512; the same on its side and upright to 768; and 8 to 32 frames."""

CONTROLNEXT = (ShapeFamily.fixed(24, 128, 72), ShapeFamily(Shape(2, 128, 72), Shape(14, 128, 72), Shape(25, 128, 72)))
"""The API's default window at 576x1024, and the windows of shorter videos and other `batch_frames`."""


def profile_of(call: UNetCall, family: ShapeFamily) -> Profile:
    """The ranges of a call's inputs. Raises `EngineError` for a family out of order or one that the UNet cannot halve."""
    if not (family.holds(family.smallest) and family.holds(family.best)):
        raise EngineError(f"{family} is out of order: smallest <= best <= largest, each side for itself")
    try:
        smallest, best, largest = (call.shapes(shape) for shape in (family.smallest, family.best, family.largest))
    except ValueError as exc:
        raise EngineError(f"{family} does not fit the UNet: {exc}") from exc
    changing = (name for name, dims in call.dims.items() if any(isinstance(dim, str) for dim in dims))
    return {name: Range(smallest[name], best[name], largest[name]) for name in changing}
