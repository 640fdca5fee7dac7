"""How a long video is cut into overlapping windows, and which window's result counts for which frame. `video-models.md` 2B.6."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """Frames start to stop - 1."""

    start: int
    stop: int

    @property
    def control_frames(self) -> list[int]:
        """The frames whose poses control this window. The first is always the reference's own, frame 0."""
        return [0, *range(self.start + 1, self.stop)]

    @property
    def first_counted(self) -> int:
        """The first local frame whose result counts. Frame 0 stands for the reference and counts in the first window only."""
        return 0 if self.start == 0 else 1


def windows(num_frames: int, batch_frames: int, overlap: int) -> tuple[Window, ...]:
    """Windows start every batch_frames - overlap frames; the last is moved back to end with the video: 240, 24, 6 give 13.

    Every frame is counted in one window at least. Raises `ValueError` unless 1 <= overlap < batch_frames.
    """
    if not 1 <= overlap < batch_frames:
        raise ValueError(f"an overlap of {overlap} frames does not fit windows of {batch_frames}")
    length = min(batch_frames, num_frames)
    starts = range(0, max(num_frames - overlap, 1), length - overlap) if length > overlap else (0,)
    return tuple(Window(min(i, num_frames - length), min(i, num_frames - length) + length) for i in starts)


def times_counted(num_frames: int, cut: tuple[Window, ...]) -> list[int]:
    """How many windows count each frame."""
    counts = [0] * num_frames
    for window in cut:
        for frame in range(window.start + window.first_counted, window.stop):
            counts[frame] += 1
    return counts
