import pytest

from engines.spec import Progress


@pytest.mark.parametrize(
    ("progress", "fraction"),
    [
        (Progress("pose", 0, 67), 0.0),
        (Progress("pose", 67, 67), 1.0),
        (Progress("step", 3, 4, Progress("window", 1, 2)), 0.875),
        (Progress("step", 0, 2, Progress("window", 1, 2, Progress("half", 1, 2))), 0.375),
        (Progress("frame", 0, 0), 1.0),
        (Progress("frame", 9, 8), 1.0),
    ],
)
def test_the_fraction_of_the_work_counts_what_is_begun(progress: Progress, fraction: float):
    assert progress.fraction == fraction
