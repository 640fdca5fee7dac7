import pytest

from engines.controlnext.windows import times_counted, windows
from tests.engines.controlnext import reference


def starts(num_frames: int, batch_frames: int, overlap: int) -> list[int]:
    return [window.start for window in windows(num_frames, batch_frames, overlap)]


def test_the_default_job_has_13_windows_of_24_frames():
    cut = windows(240, 24, 6)
    assert [window.start for window in cut] == list(range(0, 217, 18))
    assert {window.stop - window.start for window in cut} == {24}


def test_one_frame_more_costs_a_window_that_is_moved_back():
    assert starts(241, 24, 6) == [*range(0, 217, 18), 217]


@pytest.mark.parametrize(("num_frames", "batch_frames", "overlap"), [(2, 24, 6), (6, 24, 6), (5, 24, 6), (24, 24, 6), (1, 2, 1)])
def test_a_short_video_is_one_window(num_frames: int, batch_frames: int, overlap: int):
    (window,) = windows(num_frames, batch_frames, overlap)
    assert (window.start, window.stop) == (0, num_frames)


def test_every_frame_is_counted_and_the_cut_is_the_references():
    for num_frames in range(1, 60):
        for batch_frames in range(2, 12):
            for overlap in range(1, batch_frames):
                cut = windows(num_frames, batch_frames, overlap)
                expected = reference.windows(num_frames, batch_frames, overlap)
                assert [range(window.start, window.stop) for window in cut] == expected
                assert min(times_counted(num_frames, cut)) >= 1


def test_in_every_window_the_references_pose_stands_in_front_and_counts_once():
    first, second = windows(10, 6, 2)
    assert (first.control_frames, first.first_counted) == ([0, 1, 2, 3, 4, 5], 0)
    assert (second.control_frames, second.first_counted) == ([0, 5, 6, 7, 8, 9], 1)
    assert times_counted(10, (first, second)) == [1, 1, 1, 1, 1, 2, 1, 1, 1, 1]


@pytest.mark.parametrize(("batch_frames", "overlap"), [(6, 0), (6, 6), (6, 7), (1, 0), (6, -1)])
def test_an_overlap_that_would_leave_frames_uncovered_is_refused(batch_frames: int, overlap: int):
    with pytest.raises(ValueError, match="does not fit"):
        windows(10, batch_frames, overlap)
