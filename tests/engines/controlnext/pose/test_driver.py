import numpy as np
import pytest

from engines.controlnext.pose.driver import alone
from engines.controlnext.pose.skeleton import Pose
from tests.engines.controlnext.pose.people import STANDING, person, together

SQUARE = (100, 100)


def at(x: float, scale: float = 1.0, score: float = 1.0) -> Pose:
    """A standing person of this size whose middle is at x."""
    return person((STANDING - 0.5) * scale + (x, 0.5), score)


def places(poses: list[Pose]) -> list[float]:
    assert {pose.persons for pose in poses} == {1}
    return [round(float(np.median(pose.body[0, :, 0])), 1) for pose in poses]


@pytest.mark.parametrize("order", [1, -1])
def test_who_is_of_the_references_size_drives_wherever_detected(order: int):
    frames = [together(*(at(0.2 + k / 20, 0.9), at(0.8, 0.4))[::order]) for k in range(5)]
    assert places(alone(frames, at(0.5), SQUARE, SQUARE)) == places([at(0.2 + k / 20) for k in range(5)])


def test_who_was_there_before_goes_on_driving_although_another_is_nearer_in_size_for_a_moment():
    sizes = [0.9, 0.9, 0.7, 0.9, 0.9]
    frames = [together(at(0.8, 0.75), at(0.2, size)) for size in sizes]
    assert places(alone(frames, at(0.5), SQUARE, SQUARE)) == [0.2] * 5


def test_two_of_one_size_are_told_apart_by_where_they_are():
    frames = [at(0.2), together(at(0.8), at(0.2)), together(at(0.8), at(0.3)), at(0.3)]
    assert places(alone(frames, at(0.5), SQUARE, SQUARE)) == [0.2, 0.2, 0.3, 0.3]


def test_somebody_hardly_seen_does_not_drive():
    frames = [together(at(0.8, score=0.1), at(0.2, 0.5))] * 3
    assert places(alone(frames, at(0.5), SQUARE, SQUARE)) == [0.2] * 3


def test_sizes_are_compared_in_pixels_and_over_the_points_that_both_show():
    wide = together(person(STANDING * (0.5, 1)), person(STANDING * (1, 0.5) + (0, 0.2)))  # a frame twice as wide as high
    assert alone([wide], person(), SQUARE, (100, 200))[0].body[0].tolist() == wide.body[0].tolist()
    bust = person()
    bust.body_scores[0, 8:14] = 0
    frames = [together(at(0.2), at(0.8, 0.5))]
    assert places(alone(frames, bust, SQUARE, SQUARE)) == [0.2]
