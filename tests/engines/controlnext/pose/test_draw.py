"""Compares the drawing with a slow one, written from `video-models.md` 2B.5, that redraws the whole canvas in every pass."""

import colorsys
import math
from dataclasses import replace
from itertools import pairwise

import cv2
import numpy as np
import pytest

from engines.controlnext.pose.draw import draw
from engines.controlnext.pose.skeleton import Pose
from tests.engines.controlnext.pose.people import STANDING, nobody, person, together

LIMBS = "2-3,2-6,3-4,4-5,6-7,7-8,2-9,9-10,10-11,2-12,12-13,13-14,2-1,1-15,15-17,1-16,16-18"
COLOURS = (
    "(255,0,0),(255,85,0),(255,170,0),(255,255,0),(170,255,0),(85,255,0),(0,255,0),(0,255,85),(0,255,170),(0,255,255),"
    "(0,170,255),(0,85,255),(0,0,255),(85,0,255),(170,0,255),(255,0,255),(255,0,170),(255,0,85)"
)
FINGERS = [[0, 1, 2, 3, 4], [0, 5, 6, 7, 8], [0, 9, 10, 11, 12], [0, 13, 14, 15, 16], [0, 17, 18, 19, 20]]


def slow_draw(pose: Pose, height: int, width: int) -> np.ndarray:
    limbs = [tuple(int(k) - 1 for k in limb.split("-")) for limb in LIMBS.split(",")]
    colours = [tuple(int(c) for c in colour.split(",")) for colour in COLOURS[1:-1].split("),(")]
    scale = 2160 / min(height, width)
    canvas = np.zeros((round(height * scale - 0.499), round(width * scale - 0.499), 3), np.uint8)
    tall, wide = canvas.shape[:2]

    for (a, b), colour in zip(limbs, colours[:17], strict=True):
        for body, score in zip(pose.body, pose.body_scores, strict=True):
            if score[a] >= 0.3 and score[b] >= 0.3:
                (x1, y1), (x2, y2) = body[a] * (wide, tall), body[b] * (wide, tall)
                length, angle = math.sqrt((x1 - x2) ** 2 + (y1 - y2) ** 2), math.degrees(math.atan2(y1 - y2, x1 - x2))
                middle, axes = (int((x1 + x2) / 2), int((y1 + y2) / 2)), (int(length / 2), 4)
                outline = cv2.ellipse2Poly(middle, axes, int(angle), 0, 360, 1)
                cv2.fillConvexPoly(canvas, outline, [int(c * score[a] * score[b]) for c in colour])
    canvas = (canvas * 0.6).astype(np.uint8)
    for joint in range(18):
        for body, score in zip(pose.body, pose.body_scores, strict=True):
            if score[joint] > 0.3:
                centre = int(body[joint, 0] * wide), int(body[joint, 1] * tall)
                cv2.circle(canvas, centre, 4, [int(c * score[joint]) for c in colours[joint]], thickness=-1)

    hands = [(pose.hands[i, side], pose.hand_scores[i, side]) for side in (0, 1) for i in range(pose.persons)]
    for points, scores in hands:
        pixels = [(int(x * wide), int(y * tall)) for x, y in points]
        bones = [bone for finger in FINGERS for bone in pairwise(finger)]
        for e, (a, b) in enumerate(bones):
            if min(*pixels[a], *pixels[b]) > 0.01:
                value = int(scores[a] * scores[b] * 255)
                cv2.line(canvas, pixels[a], pixels[b], [c * value for c in colorsys.hsv_to_rgb(e / 20, 1, 1)], thickness=2)
        for pixel, score in zip(pixels, scores, strict=True):
            if min(pixel) > 0.01:
                cv2.circle(canvas, pixel, 4, (0, 0, int(score * 255)), thickness=-1)
    for points, scores in zip(pose.face, pose.face_scores, strict=True):
        for (x, y), score in zip(points, scores, strict=True):
            if min(int(x * wide), int(y * tall)) > 0.01:
                cv2.circle(canvas, (int(x * wide), int(y * tall)), 3, (int(score * 255),) * 3, thickness=-1)
    return cv2.cvtColor(cv2.resize(canvas, (width, height), interpolation=cv2.INTER_LINEAR), cv2.COLOR_BGR2RGB)


def crowd(seed: int, people: int = 1, score: float = 1.0) -> Pose:
    """Random people in the frame, some partly outside it."""
    rng = np.random.default_rng(seed)
    bodies = [STANDING * rng.uniform(0.4, 1.2) + rng.uniform(-0.4, 0.4, 2) for _ in range(people)]
    return together(*(person(body, score, rng) for body in bodies))


def assert_same(pose: Pose, height: int, width: int) -> np.ndarray:
    drawn = draw(pose, height, width)
    assert drawn.dtype == np.uint8
    assert drawn.flags.c_contiguous
    np.testing.assert_array_equal(drawn, slow_draw(pose, height, width))
    return drawn


@pytest.mark.parametrize("size", [(1024, 576), (576, 1024), (256, 256), (333, 200), (64, 64), (2160, 2200)])
def test_it_is_the_drawing_on_the_whole_canvas(size: tuple[int, int]):
    assert assert_same(crowd(seed=sum(size)), *size).any()


@pytest.mark.parametrize("people", [2, 5])
def test_several_people_are_drawn_over_each_other_in_order(people: int):
    assert_same(crowd(people, people), 320, 256)
    assert_same(together(person(), person(STANDING + np.array((0.01, 0.005)), score=0.5)), 320, 256)


def test_scores_above_one_saturate():
    drawn = assert_same(crowd(1, score=1.7), 320, 256)
    assert drawn.max() == 255
    strong = replace(person(), body_scores=np.full((1, 18), 1.5))
    limbs = draw(strong, 320, 256)[80:100, 125:132]  # neck to hip
    assert limbs.max() <= 0.6 * 255


def test_nobody_is_black():
    assert not assert_same(nobody(), 64, 96).any()
    assert draw(nobody(), 64, 96).shape == (64, 96, 3)


def test_absent_points_leave_out_their_limbs_and_joints():
    legless = person()
    legless.body_scores[0, 8:14] = 0.3
    legless.body_scores[0, 8:14] -= 1e-9
    drawn = assert_same(legless, 320, 256)
    assert drawn[:70].any()
    assert not drawn[155:].any()  # below the wrists


def test_the_colours_are_reversed_and_limbs_darker_than_joints():
    """Nose to neck is limb 12, (0, 0, 255) before reversal; the neck's own disc is (255, 85, 0)."""
    stick = person(STANDING * 0 + 0.5)
    stick.body[0, 0], stick.body[0, 1] = (0.5, 0.1), (0.5, 0.9)
    stick.body_scores[0, 2:] = 0
    drawn = draw(stick, 2160, 2160)
    assert drawn[1080, 1080].tolist() == [153, 0, 0]
    assert drawn[1944, 1080].tolist() == [0, 85, 255]
    assert drawn[216, 1080].tolist() == [0, 0, 255]
    assert not drawn[:, :1070].any()


def test_a_face_is_grey_dots_and_a_hand_has_blue_or_red_joints():
    face, hand = person(score=0), person(score=0)
    face.face[:], face.face_scores[0, 5] = 0.5, 0.5
    hand.hands[:], hand.hand_scores[0, 1, 20] = 0.5, 0.8
    assert draw(face, 2160, 2160)[1080, 1080].tolist() == [0, 0, 0]  # dots of score 0 are drawn over it
    face.face_scores[:] = 0.5
    assert draw(face, 2160, 2160)[1080, 1080].tolist() == [127, 127, 127]
    assert draw(hand, 2160, 2160)[1080, 1080].tolist() == [204, 0, 0]


def test_hands_and_faces_in_the_first_row_or_column_are_skipped():
    corner = person(score=0)
    corner.hands[:], corner.face[:] = (0.5 / 2160, 0.5), (0.5, 0.5 / 2160)
    corner.hand_scores[:], corner.face_scores[:] = 1, 1
    assert not assert_same(corner, 64, 64).any()


@pytest.mark.parametrize("far", [1e3, -1e3, 1e9, -1e300])
def test_points_far_outside_do_no_harm(far: float):
    pose = person(rng=np.random.default_rng(0), score=2)
    pose.body[0, 4], pose.hands[0, 0, 3], pose.face[0, 9] = far, far, far
    drawn = draw(pose, 64, 64)
    assert drawn.any()


def test_limbs_that_leave_the_frame_are_drawn_up_to_its_edge():
    assert_same(person(STANDING * 3 - 1), 320, 256)
    assert assert_same(person(STANDING * (1, 2)), 320, 256)[-1].any()
