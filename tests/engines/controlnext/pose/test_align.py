from dataclasses import replace

import numpy as np
import pytest

from engines.controlnext.pose.align import Alignment, fit, require_person
from engines.controlnext.pose.skeleton import ALIGNED, Pose
from engines.controlnext.spec import IMAGE_FIELD, VIDEO_FIELD
from engines.errors import PersonNotFound
from tests.engines.controlnext.pose.people import STANDING, nobody, person, together

SQUARE = (100, 100)


def driven(scale: tuple[float, float], shift: tuple[float, float]) -> Pose:
    """A person that scaling and shifting by these values moves onto the standing one."""
    return person((STANDING - shift) / scale)


def seen(pose: Pose, *points: int) -> Pose:
    """The pose with these body points only; the others are absent."""
    scores = np.zeros((1, 18))
    scores[0, list(points)] = 1
    return replace(pose, body_scores=scores)


@pytest.mark.parametrize("scale_y", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(
    ("reference_size", "frame_size"), [((1024, 576), (480, 640)), ((576, 1024), (640, 360)), (SQUARE, SQUARE)]
)
def test_a_known_move_is_recovered(scale_y: float, reference_size: tuple[int, int], frame_size: tuple[int, int]):
    (height, width), (frame_height, frame_width) = reference_size, frame_size
    scale_x = scale_y * frame_width / frame_height * height / width
    pose = driven((scale_x, scale_y), (-0.2, 0.1))
    found = fit(person(), [pose] * 3, reference_size, frame_size)
    np.testing.assert_allclose(
        (found.scale_x, found.scale_y, found.shift_x, found.shift_y), (scale_x, scale_y, -0.2, 0.1), atol=1e-12
    )
    np.testing.assert_allclose(found.apply(pose).body, person().body, atol=1e-12)


def test_both_axes_are_scaled_alike_in_pixels():
    found = fit(person(), [driven((9.9, 2.0), (0, 0))], (1000, 500), (300, 400))
    a_pixel_right = np.array((1 / 400, 0)) * (found.scale_x, found.scale_y) * (500, 1000)
    a_pixel_down = np.array((0, 1 / 300)) * (found.scale_x, found.scale_y) * (500, 1000)
    assert a_pixel_right[0] == pytest.approx(a_pixel_down[1])


def test_one_fit_serves_all_frames():
    """Least squares over a crouching and a standing frame, compared with numpy's."""
    crouching = person(STANDING * (1, 0.6) + (0, 0.4))
    found = fit(person(), [person(), crouching], SQUARE, SQUARE)
    ours = list(ALIGNED)
    y = np.concatenate([STANDING[ours, 1], crouching.body[0, ours, 1]])
    slope, shift = np.polyfit(y, np.tile(STANDING[ours, 1], 2), 1)
    assert (found.scale_y, found.shift_y) == pytest.approx((slope, shift))
    x = np.concatenate([STANDING[ours, 0], crouching.body[0, ours, 0]])
    assert found.shift_x == pytest.approx((np.tile(STANDING[ours, 0], 2) - found.scale_x * x).mean())


def test_swinging_arms_do_not_count():
    waving = STANDING.copy()
    waving[[3, 4, 6, 7]] = np.random.default_rng(0).uniform(-3, 3, (4, 2))
    found = fit(person(), [person(waving)], SQUARE, SQUARE)
    assert (found.scale_y, found.shift_y) == pytest.approx((1, 0))


def test_points_absent_from_the_reference_do_not_count():
    legs_elsewhere = STANDING.copy()
    legs_elsewhere[8:14] += 5
    found = fit(seen(person(), 0, 1, 2, 5, 14, 15), [person(legs_elsewhere)], SQUARE, SQUARE)
    assert (found.scale_x, found.scale_y, found.shift_x, found.shift_y) == pytest.approx((1, 1, 0, 0))


def test_points_of_low_score_in_a_driving_frame_do_count():
    pose = driven((2, 2), (0.1, 0.1))
    assert fit(person(), [seen(pose, 0)], SQUARE, SQUARE) == fit(person(), [pose], SQUARE, SQUARE)


def test_frames_with_several_people_are_moved_but_not_fitted():
    pair = together(person(STANDING + 3), person(STANDING * 7))
    found = fit(person(), [pair, driven((2, 2), (0.1, 0.2)), nobody()], SQUARE, SQUARE)
    assert (found.scale_y, found.shift_x, found.shift_y) == pytest.approx((2, 0.1, 0.2))
    np.testing.assert_allclose(found.apply(pair).body, pair.body * 2 + (0.1, 0.2))
    assert found.apply(nobody()).persons == 0


def test_the_first_of_several_people_in_the_reference_counts():
    found = fit(together(person(), person(STANDING * 5)), [person()], SQUARE, SQUARE)
    assert (found.scale_y, found.shift_x, found.shift_y) == pytest.approx((1, 0, 0))


def test_hands_and_face_move_along_and_scores_stay():
    rng = np.random.default_rng(0)
    pose = together(person(rng=rng), person(rng=rng))
    moved = Alignment(2.0, 3.0, 0.1, -0.2).apply(pose)
    for points in ("body", "hands", "face"):
        np.testing.assert_allclose(getattr(moved, points), getattr(pose, points) * (2, 3) + (0.1, -0.2))
    for scores in ("body_scores", "hand_scores", "face_scores"):
        np.testing.assert_array_equal(getattr(moved, scores), getattr(pose, scores))


@pytest.mark.parametrize("points", [(0,), (14, 15), (9,)])
def test_points_of_one_height_shift_and_do_not_scale(points: tuple[int, ...]):
    found = fit(seen(person(), *points), [person(STANDING + np.array((0.1, k))) for k in (0.0, 0.3)], (200, 100), (100, 300))
    assert (found.scale_x, found.scale_y) == pytest.approx((6, 1))
    assert found.shift_y == pytest.approx(-0.15)
    assert found.shift_x == pytest.approx((STANDING[list(points), 0] - 6 * (STANDING[list(points), 0] + 0.1)).mean())


def test_a_driving_person_in_one_line_shifts_and_does_not_scale():
    found = fit(person(), [person(STANDING * (1, 0) + (0, 0.3))], SQUARE, SQUARE)
    assert found.scale_y == 1
    assert np.isfinite([found.shift_x, found.shift_y]).all()


@pytest.mark.parametrize("scale", [-1.0, 0.01])
def test_a_fit_neither_flips_nor_collapses_a_person(scale: float):
    found = fit(person(), [driven((1, scale), (0, 0.5))], SQUARE, SQUARE)
    assert found.scale_y == 1


@pytest.mark.parametrize("reference", [nobody(), person(score=0.3), seen(person(), 3, 4, 6, 7)])
def test_a_reference_without_a_person_is_the_images_fault(reference: Pose):
    for check in (require_person, lambda pose: fit(pose, [person()], SQUARE, SQUARE)):
        with pytest.raises(PersonNotFound, match="reference image") as caught:
            check(reference)
        assert caught.value.loc == ("body", IMAGE_FIELD)


@pytest.mark.parametrize("driving", [[], [nobody()], [together(person(), person())] * 3])
def test_a_video_never_showing_one_person_alone_is_the_videos_fault(driving: list[Pose]):
    with pytest.raises(PersonNotFound, match="exactly one person") as caught:
        fit(person(), driving, SQUARE, SQUARE)
    assert caught.value.loc == ("body", VIDEO_FIELD)


@pytest.mark.parametrize("driving", [[person(score=0.3)], [seen(person(), 3, 4), person(score=0)]])
def test_a_video_without_a_visible_body_is_the_videos_fault(driving: list[Pose]):
    with pytest.raises(PersonNotFound, match="driving video") as caught:
        fit(person(), driving, SQUARE, SQUARE)
    assert caught.value.loc == ("body", VIDEO_FIELD)
