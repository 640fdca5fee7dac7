import numpy as np
import pytest

from engines.controlnext.pose.keypoints import HEIGHT, MEAN, POINTS, STD, WIDTH, Crop, decode_simcc, to_pose
from tests.engines.controlnext.published import cropped

COCO = (
    *("nose", "left eye", "right eye", "left ear", "right ear", "left shoulder", "right shoulder", "left elbow"),
    *("right elbow", "left wrist", "right wrist", "left hip", "right hip", "left knee", "right knee", "left ankle"),
    "right ankle",
)
OPENPOSE = (
    *("nose", "neck", "right shoulder", "right elbow", "right wrist", "left shoulder", "left elbow", "left wrist"),
    *("right hip", "right knee", "right ankle", "left hip", "left knee", "left ankle"),
    *("right eye", "left eye", "right ear", "left ear"),
)
LEFT_SHOULDER, RIGHT_SHOULDER = 5, 6


def simcc() -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((1, POINTS, 2 * WIDTH), np.float32), np.zeros((1, POINTS, 2 * HEIGHT), np.float32)


def test_a_point_is_where_both_axes_peak_with_the_smaller_peak_as_its_score():
    x, y = simcc()
    x[0, 0, 100], y[0, 0, 31] = 0.9, 0.7
    x[0, 132, 575], y[0, 132, 767] = 0.4, 1.2
    points, scores = decode_simcc(x, y)
    np.testing.assert_array_equal(points[[0, 132]], [[50, 15.5], [287.5, 383.5]])
    np.testing.assert_allclose(scores[[0, 132]], [0.7, 0.4])


def test_of_equal_peaks_the_first_counts():
    x, y = simcc()
    x[0, 0, [10, 20]] = y[0, 0, [8, 9]] = 0.5
    np.testing.assert_array_equal(decode_simcc(x, y)[0][0], [5, 4])


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan])
def test_a_point_without_a_positive_peak_lies_before_the_first_bin(value: float):
    x, y = simcc()
    x[0, 3], y[0, 3, 50] = value, 0.8
    points, scores = decode_simcc(x, y)
    np.testing.assert_array_equal(points[3], [-0.5, -0.5])
    assert scores[3] <= 0


@pytest.mark.parametrize(
    ("box", "size"),
    [((100, 100, 200, 200), (125, 500 / 3)), ((100, 100, 400, 140), (375, 500)), ((0, 0, 10, 100), (93.75, 125))],
)
def test_the_crop_is_a_quarter_larger_and_enlarged_to_the_nets_aspect(box: tuple[int, ...], size: tuple[float, float]):
    crop = Crop.around(np.array(box, float))
    assert crop.centre == ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    assert crop.size == pytest.approx(size)
    assert crop.size[0] / crop.size[1] == pytest.approx(WIDTH / HEIGHT)


def test_corners_of_the_crop_map_to_corners_of_its_part_of_the_frame():
    crop = Crop(centre=(300.0, 200.0), size=(144.0, 192.0))
    corners = np.array([(0.0, 0.0), (WIDTH, HEIGHT), (WIDTH / 2, HEIGHT / 2)])
    np.testing.assert_allclose(crop.to_frame(corners), [(228, 104), (372, 296), (300, 200)])


@pytest.mark.parametrize("centre", [(300.0, 200.0), (20.0, 250.0)])
@pytest.mark.parametrize("width", [60.0, 288.0, 400.0])
def test_what_is_seen_in_the_crop_maps_back_to_where_it_is(centre: tuple[float, float], width: float):
    frame = np.zeros((300, 400, 3), np.uint8)
    spot = (int(centre[0]) + 11, int(centre[1]) - 7)
    frame[spot[1] - 2 : spot[1] + 3, spot[0] - 2 : spot[0] + 3] = 255
    crop = Crop(centre, (width, width * HEIGHT / WIDTH))
    seen = crop.cut(frame)[0, 0]
    light = np.argwhere(seen > seen.max() - 0.5)[:, ::-1].mean(axis=0)
    np.testing.assert_allclose(crop.to_frame(light), spot, atol=0.51 * width / WIDTH)


def test_the_net_sees_normalised_rgb_and_black_beyond_the_frame():
    frame = np.full((100, 100, 3), (10, 120, 250), np.uint8)
    seen = Crop(centre=(0.0, 50.0), size=(72.0, 96.0)).cut(frame)
    assert seen.shape == (1, 3, HEIGHT, WIDTH)
    assert seen.dtype == np.float32
    levels = seen[0].transpose(1, 2, 0) * STD + MEAN
    np.testing.assert_allclose(levels[:, 200:], np.broadcast_to((10, 120, 250), (HEIGHT, 88, 3)), atol=1e-3)
    np.testing.assert_allclose(levels[:, :100], 0, atol=1e-3)


def whole_body() -> tuple[np.ndarray, np.ndarray]:
    """Point k at (k, 1000 + k), score 0.5 + k / 1000."""
    k = np.arange(POINTS, dtype=float)
    return np.stack([k, 1000 + k], axis=1)[None], (0.5 + k / 1000)[None]


def test_body_points_are_in_openposes_order():
    pose = to_pose(*whole_body(), height=1, width=1)
    for place, name in enumerate(OPENPOSE):
        if name != "neck":
            k = COCO.index(name)
            np.testing.assert_array_equal(pose.body[0, place], (k, 1000 + k))
            assert pose.body_scores[0, place] == 0.5 + k / 1000


def test_the_neck_is_midway_between_the_shoulders():
    points, scores = whole_body()
    points[0, [LEFT_SHOULDER, RIGHT_SHOULDER]] = (10, 20), (30, 60)
    pose = to_pose(points, scores, height=1, width=1)
    np.testing.assert_array_equal(pose.body[0, 1], (20, 40))
    assert pose.body_scores[0, 1] == 1


@pytest.mark.parametrize("hidden", [LEFT_SHOULDER, RIGHT_SHOULDER])
@pytest.mark.parametrize(("score", "neck"), [(0.3, 0), (0.31, 1)])
def test_the_neck_is_absent_with_either_shoulder(hidden: int, score: float, neck: int):
    points, scores = whole_body()
    scores[0, hidden] = score
    assert to_pose(points, scores, height=1, width=1).body_scores[0, 1] == neck


def test_feet_are_dropped_and_face_and_hands_kept_apart():
    pose = to_pose(*whole_body(), height=1, width=1)
    np.testing.assert_array_equal(pose.face[0, :, 0], np.arange(23, 91))
    np.testing.assert_array_equal(pose.hands[0, 0, :, 0], np.arange(91, 112))  # left
    np.testing.assert_array_equal(pose.hands[0, 1, :, 0], np.arange(112, 133))
    np.testing.assert_array_equal(pose.face_scores[0], 0.5 + np.arange(23, 91) / 1000)
    np.testing.assert_array_equal(pose.hand_scores[0, 1], 0.5 + np.arange(112, 133) / 1000)


def test_points_are_fractions_of_the_frame():
    points, scores = whole_body()
    pose = to_pose(points, scores, height=2000, width=100)
    np.testing.assert_allclose(pose.body[0, 0], (0, 0.5))
    np.testing.assert_allclose(pose.face[0, 0], (0.23, 1023 / 2000))
    np.testing.assert_allclose(pose.hands[0, 0, 0], (0.91, 1091 / 2000))
    np.testing.assert_allclose(pose.body[0, 1], (0.055, 1005.5 / 2000))


def test_every_person_is_kept_in_order():
    points, scores = whole_body()
    pose = to_pose(np.concatenate([points, points + 5]), np.concatenate([scores, scores]), height=1, width=1)
    assert pose.persons == 2
    np.testing.assert_array_equal(pose.body[1], pose.body[0] + 5)


def test_crops_have_the_published_bits():
    """The drawing truncates coordinates to pixels of its canvas, so a point's last bit can be seen."""
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 256, (300, 400, 3), np.uint8)
    for _ in range(60):
        left, top = rng.uniform(-20, 300, 2)
        box = np.array((left, top, left + rng.uniform(2, 300), top + rng.uniform(2, 300)), np.float32).astype(np.float64)
        crop, (seen, centre, size) = Crop.around(box), cropped(frame, box)
        np.testing.assert_array_equal((crop.centre, crop.size), (centre, size))
        np.testing.assert_array_equal(crop.cut(frame), seen)
