"""Where frames lie in time, counted in frames of the mean length: 0, 1, 2 and so on where they are evenly spaced.

Phones, browsers and screen recorders write frames when they come. Taken by count, a figure in such a video would move in jerks.
"""

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

UNEVEN = Fraction(1, 3)
"""An interval that differs by more than this share from the mean is uneven. Smaller differences are those of rounded times."""

SHORTEST_S, LONGEST_S = Fraction(2, 1000), 10
"""Other intervals, in seconds, are not measured. Shorter ones belong to packets that show nothing, as VP8's alternate references;
longer ones are jumps of the clock, as where recordings were joined."""


class FrameTimes:
    """The positions of one video's frames, in order of display.

    times: of the frames, sorted, in seconds, as far as they are known beforehand; without any, the frames are counted.
    uneven: whether an interval between these is uneven. Then positions are exact, else the frames are counted, and those missing.
    """

    def __init__(self, times: Sequence[Fraction]):
        intervals = [after - before for before, after in pairwise(times) if SHORTEST_S <= after - before <= LONGEST_S]
        self._mean = sum(intervals, Fraction(0)) / max(len(intervals), 1)
        self.uneven = self._mean > 0 and any(abs(interval / self._mean - 1) > UNEVEN for interval in intervals)
        self._time: Fraction | None = None  # of the frame before
        self._position = Fraction(-1)

    def position(self, time: Fraction | None, damaged: bool) -> Fraction:
        """The next frame's position. time: in seconds, None if unknown. damaged: whether any frame was lost so far."""
        passed = None if time is None or self._time is None else time - self._time
        if passed is None or not 0 <= passed <= LONGEST_S:
            self._position += 1
        elif self.uneven:
            self._position += passed / self._mean
        else:
            self._position += max(round(passed / self._mean), 1) if damaged and self._mean > 0 else 1
        self._time = self._time if time is None else time
        return self._position
