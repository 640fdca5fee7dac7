"""Serve's wrapper of a model's denoising: runs units of work, one at a time, for any number of jobs.

It knows nothing of a job's latents, steps or checkpoints: `sampler.py` has those. What a job's units share is made once and kept
until the job has ended, or has not been heard of for a while. A replica accepts more calls than it works on: the next one waits
with its data already here, and begins in the same thread as soon as the one before it ends.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from deployments.stages.protocol import UnitCall
from deployments.stages.threaded import Threaded
from deployments.stages.throttle import BURST
from deployments.stages.token_bucket import TokenBucket
from engines.checkpoints.fingerprint import arithmetic_of, fingerprint_of
from engines.registry import build_stage
from engines.spec import Checkpoint, Conditioning, Progress, ShouldStop
from engines.stopping import check
from engines.units import Report, Request, UnitOutput

MOST_JOBS = 8
"""How many jobs' conditioning is kept; the one that was used longest ago goes first."""
UNHEARD_S = 300.0
"""How long a job is kept whose units come no more. Its sampler has died, or would have said that the job has ended."""
REPORT_S = 0.25
"""The least time between two reports of a unit after its first ten, in seconds. A checkpoint of megabytes goes with each."""


class Kept:
    """What is kept of a job: its conditioning while that comes, then what the stage made of it."""

    def __init__(self) -> None:
        self.fetching: asyncio.Future[Conditioning] | None = None
        self.request: Request | None = None
        self.used_at = 0.0


class Denoise:
    """One replica. config: the model's."""

    def __init__(self, model: str, config: Any):
        self.stage = build_stage(model, "denoise", config)
        self.device = config.device
        self.thread = ThreadPoolExecutor(1)
        self._kept: dict[str, Kept] = {}
        self._running: dict[str, threading.Event] = {}
        self._stopped_early: deque[str] = deque(maxlen=1000)

    def arithmetic(self) -> str:
        """A hash of all that the bits of a unit depend on besides its request and the weights: library, device and engines."""
        return fingerprint_of(arithmetic_of(self.device), self.stage.engines)

    async def run(
        self, call: UnitCall, fetch: Callable[[], Awaitable[Conditioning]]
    ) -> AsyncGenerator[Report | UnitOutput, None]:
        """What the unit reports, at a limited rate, then its output. fetch: gets the job's conditioning, if it is not here yet.

        Raises `Cancelled` if stopped, within one call of a net, and the unit's errors.
        """
        stop = self._running[call.run] = threading.Event()
        if call.run in self._stopped_early:
            stop.set()
        try:
            kept = await self._prepared(call.job, fetch)

            def work(tell: Callable[[Report], None], should_stop: ShouldStop) -> UnitOutput:
                def stopped() -> bool:
                    return should_stop() or stop.is_set()

                check(stopped)
                began_at = time.monotonic()
                if kept.request is None:
                    assert kept.fetching is not None
                    kept.request, kept.fetching = self.stage.begin(kept.fetching.result()), None
                with Reports(tell) as reports:
                    output = kept.request.run(call.unit, reports, stopped)
                return replace(output, seconds=time.monotonic() - began_at)

            async with Threaded(work, self.thread) as working:
                async for report in working:
                    yield report
            kept.used_at = time.monotonic()
            yield working.product
        finally:
            del self._running[call.run]

    def stop(self, runs: Sequence[str]) -> None:
        """Ends these runs. One that is not here yet ends when it comes."""
        for run in runs:
            if run in self._running:
                self._running[run].set()
            else:
                self._stopped_early.append(run)

    def forget(self, job: str) -> None:
        """The job has ended."""
        self._kept.pop(job, None)

    async def _prepared(self, job: str, fetch: Callable[[], Awaitable[Conditioning]]) -> Kept:
        """The job's place among those kept, with its conditioning here. Others that were kept too long are dropped."""
        now = time.monotonic()
        kept = self._kept.pop(job, None) or Kept()
        self._kept[job] = kept  # at the end: used last
        kept.used_at = now
        for name, other in list(self._kept.items()):
            if other is not kept and (now - other.used_at > UNHEARD_S or len(self._kept) > MOST_JOBS):
                del self._kept[name]
        if kept.request is None:
            kept.fetching = kept.fetching or asyncio.ensure_future(fetch())
            try:
                await asyncio.shield(kept.fetching)
            except BaseException:
                if kept.fetching is not None and kept.fetching.done():
                    self._kept.pop(job, None)
                raise
        return kept


class Reports:
    """Tells a unit's steps at a limited rate, each with the progress at that step, and the last progress."""

    def __init__(self, tell: Callable[[Report], None], clock: Callable[[], float] = time.monotonic):
        self._tell = tell
        self._bucket = TokenBucket(BURST, clock)
        self._step: Checkpoint | None = None
        self._progress: Progress | None = None

    def __enter__(self) -> "Reports":
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._tell_held()

    def __call__(self, report: Report) -> None:
        """Passes a report on, or holds it back. A step comes before its progress."""
        if isinstance(report, Checkpoint):
            self._step = report
            return
        self._progress = report
        if self._bucket.take(REPORT_S):
            self._tell_held()

    def _tell_held(self) -> None:
        for held in (self._step, self._progress):
            if held is not None:
                self._tell(held)
        self._step = self._progress = None
