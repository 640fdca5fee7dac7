"""Which shapes a UNet is called with, and ranges of them. No torch.

A family is narrow on purpose: an engine's kernels are chosen for its best shape and must fit all of it. So one for each size that
is served, and not one from 8 frames at 512 to 32 at 1024. `tensorrt-triton.md`, section 5.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields


@dataclass(frozen=True, order=True)
class Shape:
    """Frames of a call, height and width of its latents (an eighth of the pixels')."""

    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class ShapeFamily:
    """The shapes from `smallest` to `largest`, each side for itself; `best` is what kernels are chosen for."""

    smallest: Shape
    best: Shape
    largest: Shape

    @classmethod
    def of_pixels(cls, shapes: Iterable[tuple[int, int, int]], scale: int) -> "tuple[ShapeFamily, ...]":
        """One shape alone for each (frames, height, width) in pixels. scale: pixels per latent."""
        return tuple(cls.fixed(frames, height // scale, width // scale) for frames, height, width in shapes)

    @classmethod
    def fixed(cls, frames: int, height: int, width: int) -> "ShapeFamily":
        """One shape alone: the fastest engine, for nothing else."""
        shape = Shape(frames, height, width)
        return cls(shape, shape, shape)

    def holds(self, shape: Shape) -> bool:
        """Whether an engine of this family takes `shape`."""
        return all(
            getattr(self.smallest, f.name) <= getattr(shape, f.name) <= getattr(self.largest, f.name) for f in fields(Shape)
        )
