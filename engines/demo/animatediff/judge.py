"""Says what a clip shows, by plain image processing: background, colour, shape, motion, and where the shape is.

It knows nothing of the models. On true clips, also after the VAE and H.264, it is nearly always right; a test states how often.
"""

from collections import Counter
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from engines.demo.animatediff.draw import images
from engines.demo.animatediff.grammar import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, Scene

Frames = NDArray[np.uint8]

_FAR = 60.0  # levels, as a distance in RGB: how far a pixel is from the background if it belongs to the shape
_SAME = 75.0  # how near a colour must be to be called by its name; the nearest two names are 110 apart
_MIN_AREA = 40  # pixels; less is no shape
_MIN_WAY = 10.0  # pixels along the path, which is 30 long


@dataclass(frozen=True)
class Verdict:
    """None where it cannot tell. centres: (F, 2), x and y in pixels, NaN in frames without a shape."""

    background: str | None
    colour: str | None
    shape: str | None
    motion: str | None
    centres: NDArray[np.float64]

    def right(self, scene: Scene) -> dict[str, bool]:
        """Which of a caption's words the clip follows."""
        return {name: getattr(self, name) == getattr(scene, name) for name in ("background", "colour", "motion", "shape")}


def judge(frames: Frames) -> Verdict:
    """frames: (F, 64, 64, 3), RGB."""
    masks = [shape_mask(frame) for frame in frames]
    seen = [(frame, mask) for frame, mask in zip(frames, masks, strict=True) if mask.any()]
    return Verdict(
        background=_most([_name(_border(frame), BACKGROUNDS) for frame in frames]),
        colour=_most([_name(np.median(frame[_core(mask)], axis=0), COLOURS) for frame, mask in seen]),
        shape=_most([_shape(mask) for _, mask in seen]),
        motion=_motion(centres := np.array([_centre(mask) for mask in masks])),
        centres=centres,
    )


def shape_mask(frame: Frames) -> NDArray[np.bool_]:
    """(64, 64): the largest connected patch that is not background; empty if it is too small to be a shape."""
    apart = np.linalg.norm(frame.astype(np.float64) - _border(frame), axis=2) > _FAR
    count, labels, stats, _ = cv2.connectedComponentsWithStats(apart.astype(np.uint8), connectivity=4)
    if count < 2:
        return np.zeros(apart.shape, bool)
    areas = stats[1:, cv2.CC_STAT_AREA]
    return (labels == 1 + int(areas.argmax())) & bool(areas.max() >= _MIN_AREA)


def overlap(mask: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Intersection over union; 0 for two empty masks."""
    return float((mask & other).sum() / max((mask | other).sum(), 1))


def true_mask(scene: Scene, centre: tuple[float, float]) -> NDArray[np.bool_]:
    """(64, 64): where the scene's shape is if it is drawn there."""
    return _template(scene.shape, *centre)


def _border(frame: Frames) -> NDArray[np.float64]:
    edge = np.concatenate([frame[0], frame[-1], frame[:, 0], frame[:, -1]])
    return np.median(edge, axis=0)


def _core(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    inner = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8), iterations=2).astype(bool)
    return inner if inner.any() else mask


def _centre(mask: NDArray[np.bool_]) -> tuple[float, float]:
    if not mask.any():
        return np.nan, np.nan
    y, x = np.nonzero(mask)
    return float(x.mean()) + 0.5, float(y.mean()) + 0.5


def _name(colour: NDArray[np.float64], names: dict[str, tuple[int, int, int]]) -> str | None:
    far = {name: float(np.linalg.norm(colour - value)) for name, value in names.items()}
    best = min(far, key=far.__getitem__)
    return best if far[best] < _SAME else None


def _shape(mask: NDArray[np.bool_]) -> str:
    """The shape that covers the mask best when it is laid over its centre."""
    x, y = _centre(mask)
    return max(SHAPES, key=lambda shape: overlap(mask, _template(shape, x, y)))


def _template(shape: str, x: float, y: float) -> NDArray[np.bool_]:
    white = images([Scene(shape=shape, colour="white", background="black")], [(x, y)])
    return np.asarray(white[0, 0] > 0.5)


def _motion(centres: NDArray[np.float64]) -> str | None:
    """The direction of the straight line through the centres, if it is long and along one axis."""
    seen = ~np.isnan(centres[:, 0])
    if seen.sum() < max(len(centres) // 2, 2):
        return None
    frames = np.flatnonzero(seen)
    way = np.polyfit(frames, centres[seen], 1)[0] * (len(centres) - 1)
    along, across = np.abs(way).max(), np.abs(way).min()
    if along < _MIN_WAY or across > along / 2:
        return None
    axis = int(np.abs(way).argmax())
    return next(name for name, step in MOTIONS.items() if step[axis] == np.sign(way[axis]))


def _most(names: list[str | None]) -> str | None:
    return Counter(names).most_common(1)[0][0] if names else None


def as_frames(clip: torch.Tensor) -> Frames:
    """(F, 3, H, W) in [0, 1] -> (F, H, W, 3) uint8."""
    return (clip.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
