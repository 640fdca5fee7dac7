"""A stage's call in a thread: its progress comes out as notes, and whoever stops listening stops it.

A stage computes for seconds or minutes and cannot be interrupted from outside, so it is asked to stop between its units of
work; the replica's event loop stays free to hear the cancel, and for Serve's health checks.
"""

import asyncio
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

from deployments.stages import Note
from engines.spec import OnProgress, Progress, ShouldStop

NOTE_INTERVAL_S = 1.0
"""A note is a row in the database, and 240 frames of poses are not worth 240."""

T = TypeVar("T")


class InThread(Generic[T]):
    """`async with` starts the call and ends when its thread has ended; in between it is iterated over for the notes.

    call: takes what it tells its progress to, and what it asks whether to stop. Left before its end (cancelled, closed), the
    call is stopped; left at its end, its error is raised. product, seconds: of the call, once it is left.
    """

    def __init__(self, call: Callable[[OnProgress, ShouldStop], T]):
        self._call = call
        self._stop = threading.Event()
        self._told: asyncio.Queue[Progress | None] = asyncio.Queue()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()

        def tell(progress: Progress) -> None:
            loop.call_soon_threadsafe(self._told.put_nowait, progress)

        self._started = time.monotonic()
        # A thread of its own: a few calls of minutes would fill asyncio's pool, and downloads could not be written meanwhile
        thread = ThreadPoolExecutor(1)
        self._work = loop.run_in_executor(thread, self._call, tell, self._stop.is_set)
        thread.shutdown(wait=False)  # ends with the call
        self._work.add_done_callback(lambda _: self._told.put_nowait(None))
        return self

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Note:
        if (progress := await self._told.get()) is None:
            raise StopAsyncIteration
        return Note(f"{progress.unit} {progress.done}/{progress.total}")

    async def __aexit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        cancelled: asyncio.CancelledError | None = None
        while not self._work.done():  # the caller's turn ends when the GPU is free, not before, however often it is cancelled
            try:
                await asyncio.wait([self._work])
            except asyncio.CancelledError as again:
                cancelled = again
        self.seconds = time.monotonic() - self._started
        error = self._work.exception()
        # Its traceback holds the stage's locals, gigabytes of a GPU, in a cycle with our own frame: the next call needs them now
        if error is not None:
            traceback.clear_frames(error.__traceback__)
        try:
            if cancelled is not None and not isinstance(exc, asyncio.CancelledError):
                raise cancelled
            if error is not None and exc is None:
                raise error
        finally:
            del error, cancelled

    @property
    def product(self) -> T:
        """What the call returned."""
        return self._work.result()


def paced(tell: OnProgress) -> OnProgress:
    """`tell`, but of each unit's progress only the first, the last and, in between, at most one a second."""
    told_at: dict[str, float] = {}

    def pace(progress: Progress) -> None:
        now = time.monotonic()
        due = progress.unit not in told_at or now - told_at[progress.unit] >= NOTE_INTERVAL_S
        if due or progress.done == progress.total:
            told_at[progress.unit] = now
            tell(progress)

    return pace
