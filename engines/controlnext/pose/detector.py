"""Finds people: fits the frame into YOLOX's square input, and reads boxes from its raw cells. `video-models.md`, section 2B.3."""

import cv2
import numpy as np
from numpy.typing import NDArray

from engines.controlnext.pose.session import Array
from engines.controlnext.pose.skeleton import Floats

SIDE = 640
STRIDES = (8, 16, 32)
CELLS = sum((SIDE // stride) ** 2 for stride in STRIDES)  # 8400
VALUES = 85
"""Values of a cell: centre x and y, log width and log height, objectness, 80 COCO classes."""

PERSON = 0
MIN_SCORE = 0.3
MAX_OVERLAP = 0.45
_GREY = 114
_FAR = 1e6
"""Boxes with a coordinate of this many pixels or more are dropped, and so are those with nan."""


def letterbox(frame: NDArray[np.uint8]) -> tuple[Array, float]:
    """(1, 3, 640, 640), 0 to 255: the frame, (H, W, 3), in the top left, grey elsewhere; and the scale it was given."""
    height, width = frame.shape[:2]
    scale = min(SIDE / height, SIDE / width)
    inner = max(int(width * scale), 1), max(int(height * scale), 1)
    square = np.full((SIDE, SIDE, 3), _GREY, np.uint8)
    square[: inner[1], : inner[0]] = cv2.resize(frame, inner, interpolation=cv2.INTER_LINEAR)
    return np.ascontiguousarray(square.transpose(2, 0, 1)[None], np.float32), scale


def find_people(cells: Array, scale: float) -> Floats:
    """Boxes (P, 4): left, top, right, bottom in pixels of the frame, best first; P is 0 if nobody is there.

    cells: (1, 8400, 85), YOLOX's raw output. scale: `letterbox`'s.
    In float32, as the published code computes: with exact boxes, one drawn pixel in 300 differs. That code drops scores below 0.1
    before suppressing overlaps and those up to 0.3 after. A box is only ever suppressed by a better one, so dropping both before
    gives the same boxes.
    """
    values = cells[0]  # (8400, 85)
    scores = values[:, 4] * values[:, 5 + PERSON]
    sure = np.flatnonzero(scores.astype(np.float64) > MIN_SCORE)  # 0.3 itself is a float64 there too
    corner, stride = _grid()
    with np.errstate(over="ignore", invalid="ignore"):
        centre = (values[sure, 0:2] + corner[sure]) * stride[sure]
        size = np.exp(values[sure, 2:4]) * stride[sure]
        boxes = np.concatenate([centre - size / 2, centre + size / 2], axis=1)
        boxes /= np.float32(scale)
    near = (np.abs(boxes) < _FAR).all(axis=1)
    return _suppress(boxes[near], scores[sure][near]).astype(np.float64)


def _grid() -> tuple[Array, Array]:
    """(8400, 2): each cell's column and row at its stride; (8400, 1): its stride. Row by row, finest stride first."""
    corners, strides = [], []
    for stride in STRIDES:
        rows, columns = np.divmod(np.arange((SIDE // stride) ** 2), SIDE // stride)
        corners.append(np.stack([columns, rows], axis=1))
        strides.append(np.full((len(rows), 1), stride))
    return np.concatenate(corners).astype(np.float32), np.concatenate(strides).astype(np.float32)


def _suppress(boxes: Array, scores: Array) -> Array:
    """Greedy: keeps the best box, drops those that share more than `MAX_OVERLAP` of their union with it, and repeats.

    YOLOX's published code counts the pixels of the right and bottom edge as part of a box, hence the `+ 1`.
    """
    left, top, right, bottom = boxes.T
    areas = (right - left + 1) * (bottom - top + 1)
    waiting = np.argsort(-scores, kind="stable")
    kept = []
    while len(waiting):
        best, waiting = waiting[0], waiting[1:]
        kept.append(best)
        wide = np.minimum(right[best], right[waiting]) - np.maximum(left[best], left[waiting]) + 1
        high = np.minimum(bottom[best], bottom[waiting]) - np.maximum(top[best], top[waiting]) + 1
        shared = wide.clip(0) * high.clip(0)
        waiting = waiting[shared / (areas[best] + areas[waiting] - shared) <= MAX_OVERLAP]
    return boxes[kept]
