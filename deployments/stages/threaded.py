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

from deployments.stages.progress import Stage
from deployments.stages.protocol import Note
from deployments.stages.throttle import Throttle
from engines.spec import OnProgress, ShouldStop

T = TypeVar("T")


class InThread(Generic[T]):
    """`async with` starts the call and ends when its thread has ended; in between it is iterated over for the notes.

    stage: which one the call is of.
    call: takes what it tells its progress to, and what it asks whether to stop. Left before its end (cancelled, closed), the
    call is stopped; left at its end, its error is raised. product, seconds: of the call, once it is left.
    """

    def __init__(self, stage: Stage, call: Callable[[OnProgress, ShouldStop], T]):
        self._stage: Stage = stage
        self._call = call
        self._stop = threading.Event()
        self._told: asyncio.Queue[Note | None] = asyncio.Queue()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()

        def tell(note: Note) -> None:
            loop.call_soon_threadsafe(self._told.put_nowait, note)

        def call() -> T:
            with Throttle(self._stage, tell) as throttle:
                return self._call(throttle, self._stop.is_set)

        self._started = time.monotonic()
        # A thread of its own: a few calls of minutes would fill asyncio's pool, and downloads could not be written meanwhile
        thread = ThreadPoolExecutor(1)
        self._work = loop.run_in_executor(thread, call)
        thread.shutdown(wait=False)  # ends with the call
        self._work.add_done_callback(lambda _: self._told.put_nowait(None))
        return self

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Note:
        if (note := await self._told.get()) is None:
            raise StopAsyncIteration
        return note

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
