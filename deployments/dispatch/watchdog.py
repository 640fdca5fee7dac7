"""How long an attempt may run, and how long it may stand still: two deadlines, checked where `dispatcher.py` renews the lease.

An attempt stands still while a stage whose turn has come notes no progress. Waiting for a turn does not count: behind a long job
it may take as long as that job.
"""

import time
from collections.abc import Callable
from typing import Protocol

from engines.errors import GenerationTimeout, ReelrayError, RunnerStalled


class Deadlines(Protocol):
    """The deadlines of one attempt; see `deployments.settings.Deadlines`."""

    @property
    def run_s(self) -> float:
        """How long it may run, in seconds."""
        ...

    @property
    def idle_s(self) -> float:
        """How long it may stand still, in seconds."""
        ...


class Watchdog:
    """One attempt's deadlines. The attempt begins now, and no stage works on it yet. clock: in seconds."""

    def __init__(self, deadlines: Deadlines, clock: Callable[[], float] = time.monotonic):
        self._idle_s = deadlines.idle_s
        self._clock = clock
        self._run_until = clock() + deadlines.run_s
        self._note_until: float | None = None

    def working(self) -> None:
        """A stage's turn has come, or it has noted progress."""
        self._note_until = self._clock() + self._idle_s

    def waiting(self) -> None:
        """A stage has ended; the next one's turn may take a while."""
        self._note_until = None

    def due_in_s(self) -> float:
        """Seconds until the first deadline."""
        return max(0.0, min(self._run_until, self._note_until or self._run_until) - self._clock())

    def overdue(self) -> ReelrayError | None:
        """The error to end the attempt with, once a deadline has passed."""
        now = self._clock()
        if now >= self._run_until:
            return GenerationTimeout()
        return RunnerStalled() if self._note_until is not None and now >= self._note_until else None
