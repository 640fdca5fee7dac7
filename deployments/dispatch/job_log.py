"""Writes the stages' notes to the job's log in the background: a slow database does not delay a stage that notes much.

Lines for the caller are written in order; if too many wait, the rest is left out and counted. Progress is written less often the
older the attempt is (600 lines in two hours), and of the progress held back only the latest waits. The first and the last
progress of each stage are always written. While the database is away the lines wait.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self
from uuid import uuid4

from deployments.jobs.claims import Claims
from deployments.jobs.database import patiently
from deployments.jobs.job import Claim, LeaseLost
from deployments.stages.protocol import Note
from deployments.stages.token_bucket import TokenBucket

BURST = 20
MOST_WAITING = 200
FLUSH_S = 5.0
"""How long an attempt that has ended waits until its last lines are written."""

logger = logging.getLogger(__name__)


class JobLog:
    """The log of one attempt. When `async with` ends, all notes have been written. clock: in seconds."""

    def __init__(self, claims: Claims, claim: Claim, clock: Callable[[], float] = time.monotonic):
        self._claims = claims
        self._claim = claim
        self._clock = clock
        self._began_at = clock()
        self._bucket = TokenBucket(BURST, clock)
        self._waiting: deque[Note] = deque()
        self._latest: Note | None = None
        self._left_out = 0
        self._stage_begins = True
        self._full = self._ending = False
        self._told = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._writing = asyncio.create_task(self._write())
        return self

    async def __aexit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        """Raises `LeaseLost` where a line met it, unless there is another error."""
        self.stage_ended()
        self._ending = True
        try:
            await asyncio.wait([self._writing], timeout=FLUSH_S)
        finally:
            unwritten = not self._writing.done()
            self._writing.cancel()
        if unwritten:
            logger.warning(
                "the last log lines were not written", extra={"action": "lines_lost", "job_id": str(self._claim.job_id)}
            )
        elif (error := self._writing.exception()) is not None and exc is None:
            raise error

    def note(self, note: Note) -> None:
        """Takes a note without waiting. Raises `LeaseLost` if an earlier one met it."""
        if self._writing.done():
            self._writing.result()
        if self._full:
            return
        if note.progress is None:
            self._add(note)
        else:
            self._latest = note
            room = len(self._waiting) < MOST_WAITING
            if self._stage_begins or (room and self._bucket.take(self._interval_s())):
                self._stage_begins = False
                self._add_latest()
        self._told.set()

    def stage_ended(self) -> None:
        """The stage has ended; what it noted last is written."""
        self._add_latest()
        self._stage_begins = True
        self._told.set()

    def _add(self, note: Note) -> None:
        if len(self._waiting) < MOST_WAITING:
            self._waiting.append(note)
        else:
            self._left_out += 1

    def _add_latest(self) -> None:
        if self._latest is not None:
            self._waiting.append(self._latest)
            self._latest = None

    async def _write(self) -> None:
        while True:
            if note := self._next():
                self._full = not await self._write_line(note)
            elif self._ending:
                return
            else:
                self._told.clear()
                due_in_s = None if self._latest is None else self._bucket.due_in_s(self._interval_s())
                with suppress(TimeoutError):
                    async with asyncio.timeout(due_in_s):
                        await self._told.wait()

    async def _write_line(self, note: Note) -> bool:
        """False: the log is full."""
        progress = None if note.progress is None else note.progress.fields()
        line_id = uuid4()
        try:
            return await patiently(lambda: self._claims.log(self._claim, note.message, note.level, progress, line_id))
        except LeaseLost:
            raise
        except Exception:  # one line is no reason to stop a render
            logger.exception("a log line was not written", extra={"action": "line_lost", "job_id": str(self._claim.job_id)})
            return True

    def _next(self) -> Note | None:
        """The next note, if one may be written now."""
        if self._full:
            self._waiting.clear()
            self._latest = None
            return None
        if self._waiting:
            return self._waiting.popleft()
        if self._left_out:
            left_out, self._left_out = self._left_out, 0
            return Note(f"{left_out} lines are left out here: they came faster than they could be written", "WARN")
        if self._latest is not None and self._bucket.take(self._interval_s()):
            note, self._latest = self._latest, None
            return note
        return None

    def _interval_s(self) -> float:
        """Seconds between two lines of progress."""
        return min(30.0, max(1.0, (self._clock() - self._began_at) / 100))
