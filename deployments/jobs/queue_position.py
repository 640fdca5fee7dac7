"""How many jobs are ahead of a job in a long queue, without counting the queue for every reader.

The place of every 200th waiting job is remembered for a while as a mark. A position is found between two marks, so it is rounded
to 200 and as old as the marks. Near the front, where callers care, the database counts instead.
"""

import asyncio
import time
from bisect import bisect_right
from collections.abc import Awaitable, Callable

STEP = 200
"""Jobs between two marks, and how far the database counts; the statements `jobs_ahead` and `marks` repeat the number."""
SHARE = 0.02
"""The share of one core that finding marks may take: 0.3 s for a million jobs (measured), so every 15 s."""

Place = tuple[int, int, int]
"""A job's priority, turn and number: jobs are claimed in ascending order."""


class QueuePositions:
    """Positions in one endpoint's queue. find_marks: reads the places of the jobs with 0, 200, 400, ... ahead of them."""

    def __init__(self, find_marks: Callable[[], Awaitable[list[Place]]]) -> None:
        self._find_marks = find_marks
        self._marks: list[Place] = []
        self._stale_at = 0.0
        self._lock = asyncio.Lock()

    async def ahead(self, place: Place) -> int:
        """How many jobs go before `place`, a multiple of `STEP` and no less than it."""
        if time.monotonic() >= self._stale_at and not (self._marks and self._lock.locked()):
            await self._refresh()
        return STEP * max(1, bisect_right(self._marks, place) - 1)

    async def _refresh(self) -> None:
        async with self._lock:
            began = time.monotonic()
            if began < self._stale_at:
                return  # another reader has just done it
            self._marks = await self._find_marks()
            ended = time.monotonic()
            self._stale_at = ended + max(1.0, (ended - began) / SHARE)
