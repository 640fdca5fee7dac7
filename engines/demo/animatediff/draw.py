"""Draws the demo's scenes: coloured frames, and scribbles of a shape's outline, both with smooth edges."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from engines.demo.animatediff.grammar import BACKGROUNDS, COLOURS, FRAMES, RADIUS, SHAPES, SIDE, Scene

Point = tuple[float, float]

_TURNS = 0.5, 7 / 6, 11 / 6  # of pi: where the normals of a triangle's sides point; the first is down
_INRADIUS = 0.5  # of an equilateral triangle, as a part of its circumradius


def distances(shapes: Tensor, centres: Tensor, scales: Tensor) -> Tensor:
    """(N, 64, 64): how many pixels each pixel's centre lies outside the shape's edge; negative inside.

    shapes: (N,) indices into `SHAPES`. centres: (N, 2), x and y in pixels. scales: (N,), 1 is the grammar's size.
    """
    grid = torch.arange(SIDE) + 0.5
    x = grid[None, None, :] - centres[:, 0, None, None]
    y = grid[None, :, None] - centres[:, 1, None, None]
    radii = torch.tensor([RADIUS[name] for name in SHAPES]) * scales[:, None]  # (N, 3)
    circle, square, triangle = (radii[:, i, None, None] for i in range(len(SHAPES)))
    sides = torch.stack([x * math.cos(math.pi * turn) + y * math.sin(math.pi * turn) for turn in _TURNS]).amax(dim=0)
    every = torch.stack(
        [x.hypot(y) - circle, torch.maximum(x.abs(), y.abs()) - square, sides - triangle * _INRADIUS], dim=1
    )  # (N, 3, H, W)
    return every[torch.arange(len(shapes)), shapes]


def colour_tensor(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """The shapes' and the backgrounds' colours, each (N, 3) in [0, 1]."""
    colours = torch.tensor([COLOURS[scene.colour] for scene in scenes]) / 255
    return colours, torch.tensor([BACKGROUNDS[scene.background] for scene in scenes]) / 255


def images(scenes: Sequence[Scene], centres: Sequence[Point], scales: Sequence[float] | None = None) -> Tensor:
    """(N, 3, 64, 64) in [0, 1]: each scene's shape at its centre."""
    inside = (0.5 - _distances(scenes, centres, scales)).clamp(0, 1)[:, None]
    colours, backgrounds = (values[:, :, None, None] for values in colour_tensor(scenes))
    return inside * colours + (1 - inside) * backgrounds


def scribbles(scenes: Sequence[Scene], centres: Sequence[Point], widths: Sequence[float]) -> Tensor:
    """(N, 3, 64, 64) in [0, 1]: white outlines on black, `widths` pixels wide."""
    half = torch.tensor(widths)[:, None, None] / 2
    lines = (0.5 + half - _distances(scenes, centres).abs()).clamp(0, 1)
    return lines[:, None].expand(-1, 3, -1, -1)


def clip(scene: Scene) -> Tensor:
    """(16, 3, 64, 64) in [0, 1]."""
    return images([scene] * FRAMES, [scene.centre(frame) for frame in range(FRAMES)])


def _distances(scenes: Sequence[Scene], centres: Sequence[Point], scales: Sequence[float] | None = None) -> Tensor:
    shapes = torch.tensor([SHAPES.index(scene.shape) for scene in scenes])
    sizes = torch.ones(len(scenes)) if scales is None else torch.tensor(scales)
    return distances(shapes, torch.tensor(centres, dtype=torch.float32), sizes)
