"""A dispatcher with timers: a job's `metrics` then show how its time was spent.

`claimed` is when its attempt began, in seconds since 1970; the others are the durations of the dispatcher's calls in seconds.
"""

import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from deployments.dispatch.dispatcher import Dispatcher
from deployments.files.file_store import FileStore
from deployments.jobs.job import Claim
from deployments.jobs.store import JobStore
from deployments.stages.protocol import Stages

CALLS = {"preprocess": "preprocess", "denoise": "denoise", "decode": "decode", "put": "file"}
"""Method -> its name in the metrics."""

_laps: ContextVar[dict[str, float]] = ContextVar("laps")


class Timed:
    """Wraps `target` and times those of its methods that `CALLS` names."""

    def __init__(self, target: Any):
        self.target = target

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.target, name)
        if name not in CALLS:
            return method

        async def timed(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return await method(*args, **options)
            finally:
                _laps.get()[CALLS[name]] = time.perf_counter() - started

        return timed


class TracedClaims(Timed):
    """Adds the measured times to the metrics of a job that succeeds."""

    async def succeed(self, claim: Claim, result: dict[str, Any], metrics: dict[str, Any]) -> None:
        await self.target.succeed(claim, result, metrics | _laps.get())


class TracedStore(Timed):
    """A store with traced claims."""

    def __init__(self, store: JobStore):
        super().__init__(store)
        self.claims = TracedClaims(store.claims)


class TracedDispatcher(Dispatcher):
    """A dispatcher whose store, files and stages are timed. Each job has its own task, so its own times."""

    def __init__(self, store: JobStore, files: FileStore, stages: Mapping[str, Stages], *settings: Any):
        timed: Any = {endpoint: Timed(each) for endpoint, each in stages.items()}
        traced_store: Any = TracedStore(store)
        timed_files: Any = Timed(files)
        super().__init__(traced_store, timed_files, timed, *settings)

    async def _work(self, claim: Claim) -> None:
        _laps.set({"claimed": time.time()})
        await super()._work(claim)
