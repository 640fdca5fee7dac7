"""Where frames lie in time, counted in frames of the usual length: 0, 1, 2 and so on where they are evenly spaced.

Phones, browsers and screen recorders write frames when they come. Taken by count, a figure in such a video would move in jerks.
"""

from collections.abc import Sequence
from fractions import Fraction

import av
from av.video.stream import VideoStream

UNEVEN = Fraction(1, 3)
"""An interval that differs by more than this share of the usual one is uneven. Smaller differences are those of rounded times."""

LONGEST_S = 10
"""A longer interval is taken for a jump of the clock, as where recordings were joined. In seconds."""


class FrameTimes:
    """The positions of one video's frames, in order of display. usual_s: see `usual_interval`; None counts the frames.

    uneven: whether an interval so far was uneven, and not because a frame in it was lost.
    """

    def __init__(self, usual_s: Fraction | None):
        self.uneven = False
        self._usual_s = usual_s
        self._lost = 0
        self._time: Fraction | None = None  # of the frame before
        self._position: Fraction | None = None

    def position(self, frame: av.VideoFrame, lost: int) -> Fraction:
        """The next frame's position. lost: how many frames could not be decoded so far."""
        time = None if frame.pts is None or frame.time_base is None else frame.pts * frame.time_base
        step = Fraction(1 + lost - self._lost)
        passed = Fraction(0) if time is None or self._time is None else time - self._time
        if self._usual_s is not None and 0 < passed <= LONGEST_S:
            step = passed / self._usual_s
            frames = max(round(step), 1)
            self.uneven = self.uneven or abs(step - frames) > UNEVEN or (frames > 1 and not lost)
            step = Fraction(frames) if abs(step - frames) <= UNEVEN else step
        self._time, self._lost = time, lost
        self._position = Fraction(0) if self._position is None else self._position + step
        return self._position


def usual_interval(stream: VideoStream, ahead: Sequence[av.Packet]) -> Fraction | None:
    """Seconds between two frames: as the header says, or as in the first packets if it is far from them; None if unknown.

    Browsers' recordings often state 1000 frames a second, which is the precision of their clock.
    """
    times = [packet.pts * packet.time_base for packet in ahead if packet.stream_index == stream.index and packet.pts is not None]
    if len(times) < 2 or max(times) == min(times):
        return None
    seen = (max(times) - min(times)) / (len(times) - 1)
    rate = stream.average_rate
    return 1 / rate if rate and Fraction(1, 3) < seen * rate < 3 else seen
