"""Compares the drawing with the published one, which redraws the whole canvas in every pass."""

from dataclasses import replace

import numpy as np
import pytest

from engines.controlnext.pose.draw import draw
from engines.controlnext.pose.skeleton import Pose
from tests.engines.controlnext.pose.people import STANDING, nobody, person, together
from tests.engines.controlnext.published import Found, drawn


def slow_draw(pose: Pose, height: int, width: int) -> np.ndarray:
    """The published drawing of our pose."""
    hands, hand_scores = (np.concatenate([each[:, 0], each[:, 1]]) for each in (pose.hands, pose.hand_scores))
    found = Found(pose.body.reshape(-1, 2), pose.body_scores, hands, hand_scores, pose.face, pose.face_scores)
    return drawn(found, height, width)


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
