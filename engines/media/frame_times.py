"""Where frames lie in time, counted in frames of the mean length: 0, 1, 2 and so on where they are evenly spaced.

Phones, browsers and screen recorders write frames when they come. Taken by count, a figure in such a video would move in jerks.
"""

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

UNEVEN = Fraction(1, 3)
"""An interval that differs by more than this share from the mean is uneven. Smaller differences are those of rounded times."""

LONGEST_S = 10
"""A longer interval is taken for a jump of the clock, as where recordings were joined. In seconds."""


class FrameTimes:
    """The positions of one video's frames, in order of display.

    times: of the frames, sorted, in seconds, as far as they are known beforehand; without any, the frames are counted.
    uneven: whether an interval between these is uneven. Then positions are exact, else whole numbers.
    """

    def __init__(self, times: Sequence[Fraction]):
        intervals = [after - before for before, after in pairwise(times) if after - before <= LONGEST_S]
        self._mean = sum(intervals) / len(intervals) if intervals else Fraction(0)
        self.uneven = self._mean > 0 and any(abs(interval / self._mean - 1) > UNEVEN for interval in intervals)
        self._time: Fraction | None = None  # of the frame before
        self._position = Fraction(0)

    def position(self, time: Fraction | None) -> Fraction:
        """The next frame's position. time: in seconds, None if the file does not say."""
        if self._time is not None:
            passed = self._mean if time is None or not 0 <= time - self._time <= LONGEST_S else time - self._time
            step = passed / self._mean if self._mean else Fraction(1)
            self._position += step if self.uneven else max(round(step), 1)
        if time is not None:
            self._time = time
        return self._position
