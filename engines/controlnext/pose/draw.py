"""Poses as the picture that the control net was trained on. `video-models.md`, section 2B.5.

It equals the published drawing on a canvas whose short side is 2160, bit for bit, and takes a twelfth of its time (5 ms instead
of 62 at 1024x576, one person, two Xeon cores), because it saves passes over that canvas: limbs are drawn in colours that are
already darkened, which is the same since nothing is blended, and the channels are reversed after the resize.
"""

import colorsys
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from engines.controlnext.pose.skeleton import HAND_BONES, LIMBS, RAINBOW, VISIBLE, Floats, Pose

SHORT_SIDE = 2160
LIMB_HALF_WIDTH = JOINT_RADIUS = 4
FACE_RADIUS = 3
BONE_THICKNESS = 2
LIMB_SHADE = 0.6

_FAR = 1 << 20
"""Points with a coordinate of this many canvas pixels or more are not drawn: OpenCV's coordinates are limited."""

_BONE_COLOURS = tuple(colorsys.hsv_to_rgb(e / len(HAND_BONES), 1.0, 1.0) for e in range(len(HAND_BONES)))

Canvas = NDArray[np.uint8]
Colour = Sequence[float]
Point = tuple[int, int]


def draw(pose: Pose, height: int, width: int) -> NDArray[np.uint8]:
    """(height, width, 3), uint8, RGB on black, from fractions of (height, width).

    Equals the published drawing in every bit (maximal and mean difference 0).
    """
    short = min(height, width)
    canvas_height, canvas_width = height * SHORT_SIDE // short, width * SHORT_SIDE // short
    canvas: Canvas = np.zeros((canvas_height, canvas_width, 3), np.uint8)
    size = np.array((canvas_width, canvas_height), np.float64)
    _draw_bodies(canvas, pose.body * size, pose.body_scores)
    for side in range(2):  # first the left hands of all people
        for hand, scores in zip(pose.hands[:, side] * size, pose.hand_scores[:, side], strict=True):
            _draw_hand(canvas, hand, scores)
    for face, scores in zip(pose.face * size, pose.face_scores, strict=True):
        _draw_face(canvas, face, scores)
    small = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.ascontiguousarray(small[..., ::-1])


def _draw_bodies(canvas: Canvas, points: Floats, scores: Floats) -> None:
    """points: (P, 18, 2), in canvas pixels. Limb by limb over all people, then joint by joint."""
    for (start, end), colour in zip(LIMBS, RAINBOW, strict=False):
        for body, score in zip(points, scores, strict=True):
            if min(score[start], score[end]) >= VISIBLE and _near(body[[start, end]]):
                shades = _shades(colour, score[start] * score[end])
                _draw_limb(canvas, body[start], body[end], [int(shade * LIMB_SHADE) for shade in shades])
    for joint, colour in enumerate(RAINBOW):
        for body, score in zip(points, scores, strict=True):
            if score[joint] > VISIBLE and _near(body[joint]):
                cv2.circle(canvas, _pixel(body[joint]), JOINT_RADIUS, _shades(colour, score[joint]), cv2.FILLED)


def _draw_limb(canvas: Canvas, start: Floats, end: Floats, colour: Colour) -> None:
    """A filled ellipse from `start` to `end`."""
    along = start - end
    half_length = int((along @ along) ** 0.5 / 2)
    degrees = int(np.degrees(np.arctan2(along[1], along[0])))
    outline = cv2.ellipse2Poly(_pixel((start + end) / 2), (half_length, LIMB_HALF_WIDTH), degrees, 0, 360, 1)
    cv2.fillConvexPoly(canvas, np.asarray(outline, np.int32), colour)


def _draw_hand(canvas: Canvas, points: Floats, scores: Floats) -> None:
    """points: (21, 2), in canvas pixels."""
    pixels, values = _pixels_inside(points), scores.tolist()
    for (start, end), hue in zip(HAND_BONES, _BONE_COLOURS, strict=True):
        if start in pixels and end in pixels:
            level = int(values[start] * values[end] * 255)
            cv2.line(canvas, pixels[start], pixels[end], [channel * level for channel in hue], BONE_THICKNESS)
    for k, pixel in pixels.items():
        cv2.circle(canvas, pixel, JOINT_RADIUS, (0, 0, int(values[k] * 255)), cv2.FILLED)


def _draw_face(canvas: Canvas, points: Floats, scores: Floats) -> None:
    """points: (68, 2), in canvas pixels."""
    values = scores.tolist()
    for k, pixel in _pixels_inside(points).items():
        cv2.circle(canvas, pixel, FACE_RADIUS, [int(values[k] * 255)] * 3, cv2.FILLED)


def _shades(colour: tuple[int, int, int], score: float) -> list[int]:
    """The colour times the score. Scores may exceed 1, so a channel is limited to 255."""
    return [min(int(channel * score), 255) for channel in colour]


def _pixel(point: Floats) -> Point:
    """Truncated towards 0, not rounded, as published."""
    return int(point[0]), int(point[1])


def _near(points: Floats) -> bool:
    return bool((np.abs(points) < _FAR).all())


def _pixels_inside(points: Floats) -> dict[int, Point]:
    """(K, 2) to the pixel of each point. Points in or before the canvas's first row or column are left out, as published."""
    inside = np.flatnonzero((points >= 1).all(axis=1) & (points < _FAR).all(axis=1))
    return {k: (int(x), int(y)) for k, (x, y) in zip(inside.tolist(), points[inside].tolist(), strict=True)}
