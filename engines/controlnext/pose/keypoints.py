"""From a box to 133 points: the pose net's input crop, decoding its SimCC output, OpenPose's numbering.

`video-models.md`, section 2B.3; SimCC, arXiv 2107.03332: one classification over x, one over y, two bins per pixel.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from engines.controlnext.pose.session import Array
from engines.controlnext.pose.skeleton import VISIBLE, Floats, Pose

WIDTH, HEIGHT = 288, 384
POINTS = 133
"""COCO-WholeBody: 17 body, 6 feet, 68 face, 21 left hand, 21 right hand."""

BINS_PER_PIXEL = 2
_PADDING = 1.25
_ASPECT = WIDTH / HEIGHT
_CROP_CORNERS = np.array(((WIDTH / 2, HEIGHT / 2), (WIDTH / 2, HEIGHT / 2 - WIDTH / 2), (0, HEIGHT / 2 - WIDTH / 2)), np.float32)
"""The crop's middle, the point half its width above, and the one beside that at the left edge: three points fix the mapping."""
MEAN = np.array((123.675, 116.28, 103.53))
STD = np.array((58.395, 57.12, 57.375))
_FACE, _LEFT, _RIGHT = slice(23, 91), slice(91, 112), slice(112, 133)

_COCO_LEFT_SHOULDER, _COCO_RIGHT_SHOULDER = 5, 6
_NECK = 17  # its index after COCO's 17
_TO_OPENPOSE = (0, _NECK, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)


@dataclass(frozen=True)
class Crop:
    """The part of a frame that the net gets: centre and size, in pixels of the frame; its aspect is 288:384.

    Each formula rounds as the published one does, operation by operation: the drawing truncates coordinates, so a last bit can
    move a point by a canvas pixel.
    """

    centre: tuple[float, float]
    size: tuple[float, float]

    @classmethod
    def around(cls, box: Floats) -> "Crop":
        """A quarter larger than `box` (left, top, right, bottom), and then made wider or higher to match the net's aspect."""
        left, top, right, bottom = box.tolist()
        width, height = max(right - left, 1.0) * _PADDING, max(bottom - top, 1.0) * _PADDING
        size = (width, width / _ASPECT) if width > height * _ASPECT else (height * _ASPECT, height)
        return cls(((left + right) / 2, (top + bottom) / 2), size)

    def cut(self, frame: NDArray[np.uint8]) -> Array:
        """(1, 3, 384, 288), normalised by ImageNet's mean and deviation; black outside the frame."""
        (x, y), reach = self.centre, self.size[0] / 2
        centre, above = np.array(((x, y), (x, y - reach)), np.float32)
        beside = above - (centre[1] - above[1], 0)
        corners = np.array((centre, above, beside), np.float32)
        to_crop = cv2.getAffineTransform(corners, _CROP_CORNERS)
        pixels = cv2.warpAffine(frame, to_crop, (WIDTH, HEIGHT), flags=cv2.INTER_LINEAR)
        return np.ascontiguousarray(((pixels - MEAN) / STD).transpose(2, 0, 1)[None], np.float32)

    def to_frame(self, points: Floats) -> Floats:
        """(..., 2) pixels of the crop to pixels of the frame."""
        return points / (WIDTH, HEIGHT) * self.size + self.centre - np.array(self.size) / 2


def decode_simcc(simcc_x: Array, simcc_y: Array) -> tuple[Floats, Floats]:
    """Points (133, 2) in pixels of the crop, and scores (133,).

    simcc_x: (1, 133, 576). simcc_y: (1, 133, 768). A point is where both peak, and its score is the smaller of the peaks;
    a score that is not finite becomes 0. If the score is not above 0, the point is at bin -1, as in the published code.
    """
    x, y = simcc_x[0], simcc_y[0]
    points = np.stack([x.argmax(axis=1), y.argmax(axis=1)], axis=1).astype(np.float64)
    scores = np.nan_to_num(np.minimum(x.max(axis=1), y.max(axis=1)).astype(np.float64), posinf=0.0, neginf=0.0)
    points[scores <= 0] = -1
    return points / BINS_PER_PIXEL, scores


def to_pose(points: Floats, scores: Floats, height: int, width: int) -> Pose:
    """COCO-WholeBody's points, (P, 133, 2) in pixels of the frame, with scores (P, 133), as OpenPose's; the feet are dropped.

    The neck is midway between the shoulders, with score 1 if both are visible, else 0.
    """
    shoulders = [_COCO_LEFT_SHOULDER, _COCO_RIGHT_SHOULDER]
    neck = points[:, shoulders].mean(axis=1, keepdims=True)  # (P, 1, 2)
    neck_score = (scores[:, shoulders] > VISIBLE).all(axis=1, keepdims=True)  # (P, 1)
    order = list(_TO_OPENPOSE)
    points = points / (width, height)
    neck = neck / (width, height)
    return Pose(
        body=np.concatenate([points[:, :_NECK], neck], axis=1)[:, order],
        body_scores=np.concatenate([scores[:, :_NECK], neck_score], axis=1)[:, order],
        hands=np.stack([points[:, _LEFT], points[:, _RIGHT]], axis=1),
        hand_scores=np.stack([scores[:, _LEFT], scores[:, _RIGHT]], axis=1),
        face=points[:, _FACE],
        face_scores=scores[:, _FACE],
    )


def to_openpose(joints: Floats) -> Floats:
    """(17, 2) in COCO's order to OpenPose's (18, 2), with the neck midway between the shoulders."""
    neck = joints[[_COCO_LEFT_SHOULDER, _COCO_RIGHT_SHOULDER]].mean(axis=0, keepdims=True)
    return np.concatenate([joints, neck])[list(_TO_OPENPOSE)]
