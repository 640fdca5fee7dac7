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
from functools import partial
from types import TracebackType
from typing import Generic, Self, TypeVar

from deployments.stages.device_memory import proving
from deployments.stages.progress import Stage
from deployments.stages.protocol import Note
from deployments.stages.throttle import Throttle
from engines.spec import OnProgress, ShouldStop

T = TypeVar("T")
N = TypeVar("N")


class Threaded(Generic[N, T]):
    """`async with` starts the call, and at its end waits for the thread. In between, iterate over it for what the call tells.

    If the block is left early (cancelled, closed), the call is stopped; else the call's error, if any, is raised.
    call: is given a function to tell items to, and one that says whether to stop. thread: where it waits for its turn; None: it
    has one of its own. product, seconds: the call's result and duration, after the block.
    """

    def __init__(self, call: Callable[[Callable[[N], None], ShouldStop], T], thread: ThreadPoolExecutor | None = None):
        self._call = call
        self._thread = thread
        self._stop = threading.Event()
        self._told: asyncio.Queue[N | None] = asyncio.Queue()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()

        def tell(item: N) -> None:
            loop.call_soon_threadsafe(self._told.put_nowait, item)

        def call() -> T:
            with proving():
                return self._call(tell, self._stop.is_set)

        self._started = time.monotonic()
        work = partial(contextvars.copy_context().run, call)  # its log records name the job's trace
        if self._thread is not None:
            self._work = loop.run_in_executor(self._thread, work)
        else:
            # Not asyncio's pool: a few calls of minutes would use up its threads, and downloads could not be written meanwhile
            own = ThreadPoolExecutor(1)
            self._work = loop.run_in_executor(own, work)
            own.shutdown(wait=False)  # ends with the call
        self._work.add_done_callback(lambda _: self._told.put_nowait(None))
        return self

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> N:
        if (item := await self._told.get()) is None:
            raise StopAsyncIteration
        return item

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
    def ended(self) -> asyncio.Future[T]:
        """Is done when the call is."""
        return self._work

    @property
    def product(self) -> T:
        """What the call returned."""
        return self._work.result()


class InThread(Threaded[Note, T]):
    """Tells notes of a stage's progress. call: is given a function to report progress to, and one that says whether to stop."""

    def __init__(self, stage: Stage, call: Callable[[OnProgress, ShouldStop], T]):
        def noted(tell: Callable[[Note], None], should_stop: ShouldStop) -> T:
            with Throttle(stage, tell) as throttle:
                return call(throttle, should_stop)

        super().__init__(noted)
