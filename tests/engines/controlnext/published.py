"""The published script of ControlNeXt SVD v2 from files to pose pictures, in our own words and without code from `engines`.

It computes what `run_controlnext.py` and its `utils/pre_process.py` and `dwpose/` compute, in the same order and in the same
types, with the same OpenCV, NumPy and ONNX Runtime calls; only the video's frames are given as arrays, where the script lets
decord decode them. Facts: `video-models.md` 2B.1 to 2B.5.
"""

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime as ort
import torch
from PIL import Image
from torch.nn import functional

Array = np.ndarray[Any, Any]
MATCHED = (0, 1, 2, 5, *range(8, 18))
"""Body points that the alignment uses."""
LIMBS = "2-3,2-6,3-4,4-5,6-7,7-8,2-9,9-10,10-11,2-12,12-13,13-14,2-1,1-15,15-17,1-16,16-18"
COLOURS = (
    "(255,0,0),(255,85,0),(255,170,0),(255,255,0),(170,255,0),(85,255,0),(0,255,0),(0,255,85),(0,255,170),(0,255,255),"
    "(0,170,255),(0,85,255),(0,0,255),(85,0,255),(170,0,255),(255,0,255),(255,0,170),(255,0,85)"
)
FINGERS = [[0, 1, 2, 3, 4], [0, 5, 6, 7, 8], [0, 9, 10, 11, 12], [0, 13, 14, 15, 16], [0, 17, 18, 19, 20]]


@dataclass(frozen=True)
class Found:
    """The people of a frame. body: (18 P, 2), hands: (2 P, 21, 2), all left ones first, face: (P, 68, 2); fractions of its size.

    body_scores: (P, 18). hand_scores: (2 P, 21). face_scores: (P, 68).
    """

    body: Array
    body_scores: Array
    hands: Array
    hand_scores: Array
    face: Array
    face_scores: Array


def reference_pixels(path: Path, height: int, width: int) -> Array:
    """(height, width, 3), uint8: the reference image, bilinear, covering the size, cropped in the middle."""
    with Image.open(path) as file:
        pixels = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)
    ratio = pixels.shape[1] / pixels.shape[2]
    size = (height, math.ceil(height / ratio)) if ratio < height / width else (math.ceil(width * ratio), width)
    scaled = functional.interpolate(pixels[None].float(), size=size, mode="bilinear", align_corners=False)[0]
    top, left = (round((have - want) / 2.0) for have, want in zip(size, (height, width), strict=True))
    kept = scaled.round().to(torch.uint8)[:, top : top + height, left : left + width]
    return kept.permute(1, 2, 0).numpy()


class Detector:
    """Both ONNX files of a folder."""

    def __init__(self, folder: Path):
        self.boxes, self.points = (
            ort.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
            for name in ("yolox_l.onnx", "dw-ll_ucoco_384.onnx")
        )

    def __call__(self, frame: Array) -> Found:
        found = [self._person(frame, box) for box in self._people(frame)]
        points, scores = (np.stack(each) for each in zip(*found, strict=True))  # (P, 133, 2), (P, 133)
        neck = (points[:, 5] + points[:, 6]) / 2
        neck_score = ((scores[:, 5] > 0.3) & (scores[:, 6] > 0.3)).astype(np.float64)
        points = np.insert(points, 17, neck, axis=1)
        scores = np.insert(scores, 17, neck_score, axis=1)
        body = [0, 17, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3]
        points[:, :18], scores[:, :18] = points[:, body], scores[:, body]
        points[..., 0] /= float(frame.shape[1])
        points[..., 1] /= float(frame.shape[0])
        return Found(
            points[:, :18].reshape(-1, 2),
            scores[:, :18],
            np.vstack([points[:, 92:113], points[:, 113:]]),
            np.vstack([scores[:, 92:113], scores[:, 113:]]),
            points[:, 24:92],
            scores[:, 24:92],
        )

    def _people(self, frame: Array) -> Array:
        """Boxes (P, 4), best first; the whole frame if there are none."""
        height, width = frame.shape[:2]
        ratio = min(640 / height, 640 / width)
        inner = int(width * ratio), int(height * ratio)
        square = np.full((640, 640, 3), 114, np.uint8)
        square[: inner[1], : inner[0]] = cv2.resize(frame, inner, interpolation=cv2.INTER_LINEAR)
        (given,) = self.boxes.get_inputs()
        values = self.boxes.run(None, {given.name: square.transpose(2, 0, 1)[None].astype(np.float32)})[0][0]
        first = 0
        for stride in (8, 16, 32):
            side = 640 // stride
            cells = values[first : first + side * side]
            columns, rows = np.meshgrid(np.arange(side), np.arange(side))
            cells[:, 0:2] = (cells[:, 0:2] + np.stack([columns, rows], 2).reshape(-1, 2)) * stride
            cells[:, 2:4] = np.exp(cells[:, 2:4]) * stride
            first += side * side
        boxes = np.empty_like(values[:, :4])
        boxes[:, 0:2] = values[:, 0:2] - values[:, 2:4] / 2.0
        boxes[:, 2:4] = values[:, 0:2] + values[:, 2:4] / 2.0
        boxes /= ratio
        scores = values[:, 4] * values[:, 5]
        likely = np.flatnonzero(scores > 0.1)
        kept = [i for i in _without_overlaps(boxes, scores, likely) if float(scores[i]) > 0.3]
        return boxes[kept].astype(np.float64) if kept else np.array([[0, 0, width, height]])

    def _person(self, frame: Array, box: Array) -> tuple[Array, Array]:
        """Points (133, 2) in pixels of the frame, and scores (133,)."""
        crop, centre, size = cropped(frame, box)
        (given,) = self.points.get_inputs()
        x, y = (out[0] for out in self.points.run(None, {given.name: crop}))
        places = np.stack([x.argmax(1), y.argmax(1)], axis=1).astype(np.float32)
        scores = np.minimum(x.max(1), y.max(1))
        places[scores <= 0] = -1
        places /= 2.0
        return places / (288, 384) * size + centre - size / 2, scores.astype(np.float64)


def cropped(frame: Array, box: Array) -> tuple[Array, Array, Array]:
    """What the pose net sees of a box, (1, 3, 384, 288), and that crop's centre and size in pixels of the frame."""
    centre = np.array([box[0] + box[2], box[1] + box[3]]) * 0.5
    wide, high = (box[2:] - box[:2]) * 1.25
    aspect = 288 / 384
    size = np.array([wide, wide / aspect] if wide > high * aspect else [high * aspect, high])
    there = np.zeros((3, 2), np.float32)
    there[0] = centre
    there[1] = centre[0], centre[1] + size[0] * -0.5
    there[2] = there[1, 0] - (there[0, 1] - there[1, 1]), there[1, 1] + (there[0, 0] - there[1, 0])
    here = np.array([(144, 192), (144, 48), (0, 48)], np.float32)
    crop = cv2.warpAffine(frame, cv2.getAffineTransform(there, here), (288, 384), flags=cv2.INTER_LINEAR)
    crop = (crop - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])
    return crop.transpose(2, 0, 1)[None].astype(np.float32), centre, size


def _without_overlaps(boxes: Array, scores: Array, waiting: Array) -> list[int]:
    """Of boxes that share more than 0.45 of their union, only the best; pixels on both edges count."""
    kept: list[int] = []
    for i in sorted(waiting.tolist(), key=lambda k: -scores[k]):
        left, top, right, bottom = boxes[i]
        clear = True
        for k in kept:
            wide = max(0.0, min(right, boxes[k, 2]) - max(left, boxes[k, 0]) + 1)
            high = max(0.0, min(bottom, boxes[k, 3]) - max(top, boxes[k, 1]) + 1)
            areas = [(b[2] - b[0] + 1) * (b[3] - b[1] + 1) for b in (boxes[i], boxes[k])]
            clear &= wide * high / (areas[0] + areas[1] - wide * high) <= 0.45
        if clear:
            kept.append(i)
    return kept


def aligned(reference: Found, size: tuple[int, int], found: Sequence[Found], frame_size: tuple[int, int]) -> list[Found]:
    """The driving people moved onto the reference's body. size, frame_size: (height, width) of the image and of the video."""
    (height, width), (frame_height, frame_width) = size, frame_size
    points = [k for k in MATCHED if reference.body_scores[0, k] > 0.3]
    wanted = reference.body[points]
    bodies = np.stack([each.body for each in found if len(each.body) == 18])[:, points]  # (F, K, 2)
    ay, by = np.polyfit(bodies[..., 1].flatten(), np.tile(wanted[:, 1], len(bodies)), 1)
    ax = ay / (frame_height / frame_width / height * width)
    bx = np.mean(np.tile(wanted[:, 0], len(bodies)) - bodies[..., 0].flatten() * ax)
    a, b = np.array([ax, ay]), np.array([bx, by])
    return [replace(each, body=each.body * a + b, face=each.face * a + b, hands=each.hands * a + b) for each in found]


def drawn(found: Found, height: int, width: int) -> Array:
    """(height, width, 3), uint8: the people on a canvas of 2160 pixels on its short side, made smaller, channels reversed."""
    scale = 2160 / min(height, width)
    canvas = np.zeros((int(height * scale), int(width * scale), 3), np.uint8)
    size = np.array([canvas.shape[1], canvas.shape[0]], np.float64)
    canvas = _with_bodies(canvas, found.body.reshape(-1, 18, 2) * size, found.body_scores)
    for points, scores in zip(found.hands, found.hand_scores, strict=True):
        pixels = [(int(x), int(y)) for x, y in points * size]
        bones = [bone for finger in FINGERS for bone in pairwise(finger)]
        for e, (a, b) in enumerate(bones):
            if min(*pixels[a], *pixels[b]) > 0.01:
                value = int(scores[a] * scores[b] * 255)
                cv2.line(canvas, pixels[a], pixels[b], [c * value for c in colorsys.hsv_to_rgb(e / 20, 1, 1)], thickness=2)
        for pixel, score in zip(pixels, scores, strict=True):
            if min(pixel) > 0.01:
                cv2.circle(canvas, pixel, 4, (0, 0, int(score * 255)), thickness=-1)
    for points, scores in zip(found.face, found.face_scores, strict=True):
        for (x, y), score in zip(points * size, scores, strict=True):
            if min(int(x), int(y)) > 0.01:
                cv2.circle(canvas, (int(x), int(y)), 3, (int(score * 255),) * 3, thickness=-1)
    return cv2.cvtColor(cv2.resize(canvas, (width, height)), cv2.COLOR_BGR2RGB)


def _with_bodies(canvas: Array, bodies: Array, scores: Array) -> Array:
    """Limbs, all of it darkened, then joints."""
    limbs = [tuple(int(k) - 1 for k in limb.split("-")) for limb in LIMBS.split(",")]
    colours = [tuple(int(c) for c in colour.split(",")) for colour in COLOURS[1:-1].split("),(")]
    for (a, b), colour in zip(limbs, colours[:17], strict=True):
        for body, score in zip(bodies, scores, strict=True):
            if score[a] >= 0.3 and score[b] >= 0.3:
                (x1, y1), (x2, y2) = body[a], body[b]
                length = ((y1 - y2) ** 2 + (x1 - x2) ** 2) ** 0.5
                middle, axes = (int((x1 + x2) / 2), int((y1 + y2) / 2)), (int(length / 2), 4)
                outline: Any = cv2.ellipse2Poly(middle, axes, int(math.degrees(math.atan2(y1 - y2, x1 - x2))), 0, 360, 1)
                cv2.fillConvexPoly(canvas, outline, [int(c * (score[a] * score[b])) for c in colour])
    canvas = (canvas * 0.6).astype(np.uint8)
    for joint, colour in enumerate(colours):
        for body, score in zip(bodies, scores, strict=True):
            if score[joint] > 0.3:
                centre = int(body[joint, 0]), int(body[joint, 1])
                cv2.circle(canvas, centre, 4, [int(c * score[joint]) for c in colour], thickness=-1)
    return canvas
