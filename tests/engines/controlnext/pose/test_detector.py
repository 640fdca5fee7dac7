import numpy as np
import pytest

from engines.controlnext.pose.detector import CELLS, VALUES, find_people, letterbox

FIRST_CELL = {8: 0, 16: 80 * 80, 32: 80 * 80 + 40 * 40}


def nothing() -> np.ndarray:
    return np.zeros((1, CELLS, VALUES), np.float32)


def put(cells: np.ndarray, box: tuple[float, ...], stride: int = 16, score: float = 0.9, kind: int = 0, cell: int = 0) -> None:
    """Writes a box (left, top, right, bottom), in pixels of the square, into a cell of that stride as YOLOX encodes it."""
    left, top, right, bottom = box
    row, column = divmod(cell, 640 // stride)
    values = cells[0, FIRST_CELL[stride] + cell]
    values[0:2] = (left + right) / 2 / stride - column, (top + bottom) / 2 / stride - row
    values[2:4] = np.log((right - left) / stride), np.log((bottom - top) / stride)
    values[4] = score
    values[5 + kind] = 1.0


@pytest.mark.parametrize(("stride", "cell"), [(8, 0), (8, 6399), (16, 0), (16, 41), (16, 1599), (32, 19), (32, 399)])
def test_a_box_comes_back_from_any_cell_of_any_stride(stride: int, cell: int):
    cells = nothing()
    put(cells, (100, 50, 228, 306), stride, cell=cell)
    np.testing.assert_allclose(find_people(cells, 1.0), [[100, 50, 228, 306]], atol=1e-3)


def test_boxes_are_in_pixels_of_the_frame():
    cells = nothing()
    put(cells, (100, 50, 200, 300))
    np.testing.assert_allclose(find_people(cells, 0.5), [[200, 100, 400, 600]], atol=1e-3)


def test_nobody_is_no_box():
    assert find_people(nothing(), 1.0).shape == (0, 4)


@pytest.mark.parametrize(("score", "people"), [(0.29, 0), (0.31, 1)])
def test_a_person_has_a_score_above_a_third(score: float, people: int):
    cells = nothing()
    put(cells, (100, 50, 200, 300), score=score)
    assert len(find_people(cells, 1.0)) == people


def test_the_score_is_objectness_times_class():
    cells = nothing()
    put(cells, (100, 50, 200, 300), score=0.5)
    cells[0, FIRST_CELL[16], 5] = 0.5
    assert len(find_people(cells, 1.0)) == 0


def test_a_dog_is_not_a_person_and_hides_none():
    cells = nothing()
    put(cells, (100, 50, 200, 300), score=0.95, kind=16)
    put(cells, (102, 50, 200, 300), score=0.5, cell=1)
    np.testing.assert_allclose(find_people(cells, 1.0), [[102, 50, 200, 300]], atol=1e-3)


def test_of_boxes_that_overlap_the_best_stays():
    cells = nothing()
    put(cells, (100, 100, 200, 200), score=0.6, cell=0)
    put(cells, (105, 100, 205, 200), score=0.8, cell=1)
    put(cells, (110, 100, 210, 200), score=0.7, cell=2)
    np.testing.assert_allclose(find_people(cells, 1.0), [[105, 100, 205, 200]], atol=1e-3)


@pytest.mark.parametrize(("shift", "people"), [(37, 1), (39, 2)])  # 63/137 is 0.46, 61/139 is 0.44 of the union
def test_boxes_share_at_most_45_percent_of_their_union(shift: int, people: int):
    cells = nothing()
    put(cells, (100, 100, 200, 200), score=0.6, cell=0)
    put(cells, (100 + shift, 100, 200 + shift, 200), score=0.8, cell=1)
    assert len(find_people(cells, 1.0)) == people


def test_a_box_suppressed_by_a_better_one_suppresses_no_third():
    cells = nothing()
    for cell, (left, score) in enumerate([(100, 0.9), (130, 0.8), (160, 0.7)]):
        put(cells, (left, 100, left + 100, 200), score=score, cell=cell)
    assert [box[0] for box in find_people(cells, 1.0).round()] == [100, 160]


def test_people_come_best_first_and_equal_ones_in_the_order_of_cells():
    cells = nothing()
    for cell, score in enumerate([0.5, 0.9, 0.5]):
        put(cells, (200 * cell, 0, 200 * cell + 100, 300), score=score, cell=cell)
    assert [box[0] for box in find_people(cells, 1.0).round()] == [200, 0, 400]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1000.0, 80.0])
def test_a_box_without_size_or_number_is_no_box(value: float):
    cells = nothing()
    put(cells, (100, 50, 200, 300))
    cells[0, FIRST_CELL[16], 2] = value
    assert len(find_people(cells, 1.0)) == 0


@pytest.mark.parametrize(
    ("size", "inner", "scale"),
    [((320, 1280), (160, 640), 0.5), ((1280, 1280), (640, 640), 0.5), ((320, 160), (640, 320), 2.0), ((7, 2000), (2, 640), 0.32)],
)
def test_the_frame_is_scaled_into_the_top_left_of_a_grey_square(size: tuple[int, int], inner: tuple[int, int], scale: float):
    square, given = letterbox(np.full((*size, 3), (10, 20, 30), np.uint8))
    assert square.shape == (1, 3, 640, 640)
    assert square.dtype == np.float32
    assert given == pytest.approx(scale)
    expected = np.full((640, 640, 3), 114.0)
    expected[: inner[0], : inner[1]] = (10, 20, 30)
    np.testing.assert_array_equal(square[0].transpose(1, 2, 0), expected)


def test_a_frame_of_one_scaled_row_still_has_that_row():
    square, _ = letterbox(np.full((2, 2000, 3), 7, np.uint8))
    assert (square[0, :, 0] == 7).all()
    assert (square[0, :, 1:] == 114).all()


def published_boxes(cells: np.ndarray, scale: float) -> np.ndarray:
    """YOLOX's published decoding, in which float32 arrays take the results: corners of every cell's box."""
    corners, strides = [], []
    for stride in (8, 16, 32):
        rows, columns = np.meshgrid(np.arange(640 // stride), np.arange(640 // stride))
        corners.append(np.stack((rows, columns), 2).reshape(-1, 2))
        strides.append(np.full(((640 // stride) ** 2, 1), stride))
    values = cells[0].copy()
    values[:, :2] = (values[:, :2] + np.concatenate(corners)) * np.concatenate(strides)
    values[:, 2:4] = np.exp(values[:, 2:4]) * np.concatenate(strides)
    boxes = np.ones_like(values[:, :4])
    boxes[:, :2] = values[:, :2] - values[:, 2:4] / 2.0
    boxes[:, 2:] = values[:, :2] + values[:, 2:4] / 2.0
    boxes /= scale
    return boxes


def test_boxes_have_the_published_bits():
    """A box of other bits moves points over the edge of a canvas pixel, since drawing truncates."""
    rng = np.random.default_rng(0)
    for cell in rng.integers(0, 8400, 200).tolist():
        cells = nothing()
        cells[0, cell, :4] = rng.normal(0, 1, 4)
        cells[0, cell, 4:6] = 1
        scale = 640 / int(rng.integers(200, 4000))
        np.testing.assert_array_equal(find_people(cells, scale), published_boxes(cells, scale)[[cell]])
