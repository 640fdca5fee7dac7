"""Runs a stage's call in a thread: its progress becomes notes, and it is stopped when nobody waits for it any more.

A stage computes for seconds or minutes and cannot be interrupted from outside, so it asks between its units of work whether to
stop. The replica's event loop meanwhile stays free to receive a cancel, and for Serve's health checks.
"""

import asyncio
import contextvars
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

from deployments.stages.device_memory import proving
from deployments.stages.progress import Stage
from deployments.stages.protocol import Note
from deployments.stages.throttle import Throttle
from engines.spec import OnProgress, ShouldStop

T = TypeVar("T")


class InThread(Generic[T]):
    """`async with` starts the call, and at its end waits for the thread. In between, iterate over it for the notes.

    If the block is left early (cancelled, closed), the call is stopped; else the call's error, if any, is raised.
    stage: the one that is called. call: is given a function to report its progress to, and one that says whether to stop.
    product, seconds: the call's result and duration, after the block.
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
            with proving(), Throttle(self._stage, tell) as throttle:
                return self._call(throttle, self._stop.is_set)

        self._started = time.monotonic()
        # Not asyncio's pool: a few calls of minutes would use up its threads, and downloads could not be written meanwhile
        thread = ThreadPoolExecutor(1)
        self._work = loop.run_in_executor(thread, contextvars.copy_context().run, call)  # its log records name the job's trace
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
        while not self._work.done():  # also if cancelled again: the caller gives up its turn when the GPU is free, not before
            try:
                await asyncio.wait([self._work])
            except asyncio.CancelledError as again:
                cancelled = again
        self.seconds = time.monotonic() - self._started
        error = self._work.exception()
        # The error's traceback holds the stage's local variables, gigabytes of GPU memory, in a cycle with our own frame. The
        # next call needs that memory now, not when the garbage collector runs.
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
