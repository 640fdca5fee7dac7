"""A family of shapes as a TensorRT profile: the ranges of a UNet call's inputs."""

from collections.abc import Mapping
from dataclasses import dataclass

from engines.backends.shapes import ShapeFamily
from engines.backends.unet_call import UNetCall
from engines.errors import EngineError


@dataclass(frozen=True)
class Range:
    """The shapes of one input, as a TensorRT profile needs them."""

    smallest: tuple[int, ...]
    best: tuple[int, ...]
    largest: tuple[int, ...]


Profile = Mapping[str, Range]
"""A range for every input whose shape may change."""


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
