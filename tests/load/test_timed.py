import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any

from deployments.files.file_store import FileStore
from deployments.jobs.store import JobStore
from deployments.settings import RetentionSettings
from tests.deployments.dispatch.test_dispatcher import QUICK, ended, nothing, submit
from tests.fakes import ENDPOINT, ScriptedStages
from tests.load.timed import CALLS, TracedDispatcher


async def test_a_job_of_the_traced_dispatcher_tells_how_long_each_call_took(store: JobStore, tmp_path: Path):
    stages: Any = {ENDPOINT: ScriptedStages(nothing)}
    working = asyncio.create_task(TracedDispatcher(store, FileStore(str(tmp_path)), stages, QUICK, RetentionSettings()).run())
    job = await ended(store, await submit(store))
    working.cancel()
    with suppress(asyncio.CancelledError):
        await working
    assert job.failure is None
    assert {*CALLS.values(), "claimed", "inference_time"} <= set(job.metrics)
