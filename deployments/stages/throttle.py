"""Turns a stage's progress into notes at a limited rate, in the replica: no 100,000 notes are sent only to be dropped.

The first ten units of work are all noted, so a job of four steps shows each; after them, one a second. Progress within a unit is
noted once a second at most, and only if nothing else was. At the end, the last progress that was held back is noted.
"""

import time
from collections.abc import Callable
from typing import Self

from deployments.stages.progress import Estimate, Stage, StageProgress
from deployments.stages.protocol import Note
from deployments.stages.token_bucket import TokenBucket
from engines.spec import Progress

BURST = 10
INTERVAL_S = 1.0


class Throttle:
    """A context manager that a stage calls with its progress. tell: is given the notes. clock: in seconds."""

    def __init__(self, stage: Stage, tell: Callable[[Note], None], clock: Callable[[], float] = time.monotonic):
        self._stage = stage
        self._tell = tell
        self._clock = clock
        self._bucket = TokenBucket(BURST, clock)
        self._estimate = Estimate(clock)
        self._told_at = float("-inf")
        self._held: StageProgress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._tell_held()

    def __call__(self, progress: Progress) -> None:
        """Passes the progress on as a note, or holds it back."""
        self._held = StageProgress(self._stage, progress, self._estimate.eta_s(progress.fraction))
        within = progress.within is not None
        if (self._clock() - self._told_at >= INTERVAL_S) if within else self._bucket.take(INTERVAL_S):
            self._tell_held()

    def _tell_held(self) -> None:
        if self._held is not None:
            self._told_at = self._clock()
            self._tell(Note(self._held.message, progress=self._held))
            self._held = None
