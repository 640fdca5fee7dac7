import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, NoReturn
from urllib.parse import urlsplit
from uuid import UUID

import pytest

from deployments.dispatch.dispatcher import Dispatcher
from deployments.dispatch.watchdog import Watchdog
from deployments.files.file_store import FileStore
from deployments.jobs import retry
from deployments.jobs.database import StoreAway
from deployments.jobs.job import Job, JobState, NewJob
from deployments.jobs.store import JobStore
from deployments.settings import Deadlines, QueueSettings, RetentionSettings, Settings
from deployments.stages.isolation import Isolation
from deployments.stages.progress import StageProgress
from deployments.stages.protocol import CheckpointRef, Done, Note, OnNote, Stages, Started
from engines.errors import FileDownloadError, RunnerDisconnected, RunnerFailed, RunnerStalled, SamplerLost
from engines.spec import Progress
from tests.conftest import execute
from tests.fakes import ENDPOINT, EndlessStage, LocalStages, ScriptedStages, for_ever, held_after
from tests.patience import PATIENCE_S

ROOM = 2
QUICK = QueueSettings(max_attempts=3, max_in_flight=ROOM)
SHORT = QUICK.model_copy(update={"lease_s": 0.6})
"""For tests in which a lease must run out, or is renewed often."""
INPUT = {"prompt": "a red ball", "seed": 42}


async def nothing(_: dict[str, Any]) -> None:
    pass


@asynccontextmanager
async def dispatching(
    store: JobStore, files: FileStore, stages: Stages, queue: QueueSettings = QUICK, endpoint: str = ENDPOINT
) -> AsyncIterator[None]:
    task = asyncio.create_task(Dispatcher(store, files, {endpoint: stages}, queue, RetentionSettings()).run())
    try:
        yield
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def submit(store: JobStore, **job: Any) -> UUID:
    return (await store.submit(NewJob(endpoint=ENDPOINT, input={**INPUT, **job}, max_attempts=QUICK.max_attempts))).id


async def until(store: JobStore, job_id: UUID, met: Callable[[Job], bool]) -> Job:
    async with asyncio.timeout(PATIENCE_S), store.watch(job_id) as changes:
        while True:
            job = await store.get(job_id)
            assert job is not None
            if met(job):
                return job
            await changes.changed(0.2)


async def ended(store: JobStore, job_id: UUID) -> Job:
    return await until(store, job_id, lambda job: job.state.ended)


async def started(store: JobStore, job_id: UUID, line: str = "step 1/") -> None:
    async with asyncio.timeout(PATIENCE_S), store.watch_lines(job_id) as changes:
        while not any(line in logged.message for logged in await store.logs(job_id)):
            await changes.changed(0.2)


@pytest.fixture(scope="module")
def local_stages(demo_settings: Settings) -> LocalStages:
    return LocalStages(demo_settings)


async def test_a_job_is_rendered_and_its_file_kept(store: JobStore, files: FileStore, local_stages: LocalStages):
    async with dispatching(store, files, local_stages):
        job_id = await submit(store, prompt="ball" * 30)
        job = await ended(store, job_id)
    assert job.state is JobState.SUCCEEDED
    assert job.result is not None
    assert job.result["seed"] == 42
    name = job.result["video"]["url"].removeprefix("/files/")
    assert await files.size(name) == job.result["video"]["file_size"] > 1000
    assert job.metrics["inference_time"] > 0
    receipt = job.metrics["receipt"]
    assert (receipt["engine"], receipt["options"]["dtype"], receipt["gpu_seconds"]) == ("eager", "float32", {})
    assert receipt["weights"]["base"].keys() == {"fingerprint"}
    assert receipt["seconds"].keys() == {"preprocess", "denoise", "decode"}
    lines = await store.logs(job_id)
    assert [line.seq for line in lines] == list(range(1, len(lines) + 1))
    assert (lines[0].level, lines[0].message) == ("WARN", "prompt cut to its first 75 of 120 tokens")
    assert [line.message.partition(",")[0] for line in lines[1:]] == [f"denoise: step {i}/4" for i in range(5)]
    assert [line.progress and line.progress["step"]["done"] for line in lines] == [None, 0, 1, 2, 3, 4]


async def test_a_job_of_another_version_is_told_what_of_its_input_is_ignored(store: JobStore, files: FileStore):
    async with dispatching(store, files, ScriptedStages(nothing)):
        job_id = (await store.submit(NewJob(ENDPOINT, INPUT | {"a_later_field": 1}, input_version=7))).id
        await ended(store, job_id)
    (first, *_) = await store.logs(job_id)
    assert first.level == "WARN"
    assert first.message.startswith("accepted under version 7 of the inputs; ")
    assert first.message.endswith("ignores a_later_field")


async def test_a_cancelled_job_frees_the_stage(
    store: JobStore, files: FileStore, local_stages: LocalStages, monkeypatch: pytest.MonkeyPatch
):
    calls: list[int] = []
    replica = local_stages.denoise_replica
    monkeypatch.setattr(replica.stage, "begin", replica.stage.begin)  # puts back what `held_after` exchanges
    held_after(replica, step=2)
    hook = replica.stage.unet.register_forward_pre_hook(lambda *_: calls.append(1))  # type: ignore[attr-defined]
    async with dispatching(store, files, local_stages):
        job_id = await submit(store, num_inference_steps=50)
        await started(store, job_id)
        assert await store.request_cancel(job_id) is JobState.RUNNING
        job = await ended(store, job_id)
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.wrap_future(replica.thread.submit(lambda: None))  # as the next job could now
        assert len(calls) == 2
    hook.remove()
    assert job.state is JobState.CANCELLED


@pytest.mark.parametrize("stage", ["preprocess", "decode"])
async def test_a_job_is_cancelled_in_the_middle_of_a_long_stage(
    store: JobStore, files: FileStore, local_stages: LocalStages, monkeypatch: pytest.MonkeyPatch, stage: str
):
    endless = EndlessStage()
    monkeypatch.setattr(getattr(local_stages, f"{stage}_replica"), "stage", endless)
    async with dispatching(store, files, local_stages):
        job_id = await submit(store, num_inference_steps=1)
        await started(store, job_id, "frame 1/")
        assert endless.running
        assert await store.request_cancel(job_id) is JobState.RUNNING
        job = await ended(store, job_id)
        assert not endless.running
    assert job.state is JobState.CANCELLED


async def test_a_bad_file_fails_the_job_with_its_field(store: JobStore, files: FileStore, local_stages: LocalStages):
    async with dispatching(store, files, local_stages):
        job_id = await submit(store, keyframe_0_image_url="data:image/png;base64,AAAA", keyframe_0_index=0)
        job = await ended(store, job_id)
    assert job.failure is not None
    assert (job.failure.status, job.attempt) == (422, 1)
    assert job.failure.body["detail"][0]["loc"] == ["body", "keyframe_0_image_url"]


async def test_a_runner_that_dies_is_tried_again(store: JobStore, files: FileStore):
    deaths = iter([RunnerDisconnected(), RunnerDisconnected()])

    async def die_twice(_: dict[str, Any]) -> None:
        if death := next(deaths, None):
            raise death

    async with dispatching(store, files, ScriptedStages(die_twice)):
        job = await ended(store, await submit(store))
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 3)


async def test_an_input_that_kills_its_replica_gets_three_of_them(store: JobStore, files: FileStore, database: str):
    async def die(_: dict[str, Any]) -> None:
        raise RunnerDisconnected

    class Unreachable(ScriptedStages):
        async def preprocess(self, job_input: dict[str, Any], on_note: OnNote, *, alone: bool = False) -> Done[Any]:
            if self.preprocessed < 2:  # nobody has begun to work on the job
                self.preprocessed += 1
                raise RunnerDisconnected
            return await super().preprocess(job_input, on_note)

        preprocessed = 0

    async with dispatching(store, files, stages := Unreachable(die)):
        job_id = (await store.submit(NewJob(endpoint=ENDPOINT, input=INPUT, max_attempts=10))).id
        while not (job := await until(store, job_id, lambda job: job.state is not JobState.RUNNING)).state.ended:
            await execute(database, "UPDATE jobs SET not_before = NULL; NOTIFY reelray, 'work'")
            await asyncio.sleep(0.05)
    assert job.failure is not None
    assert (job.attempt, stages.calls, job.failure.error_type) == (5, 3, "runner_disconnected")


async def test_a_job_that_loses_any_number_of_samplers_is_not_suspected(store: JobStore, files: FileStore, database: str):
    errors = iter([SamplerLost(), RunnerDisconnected(), *[SamplerLost()] * 4, RunnerDisconnected()])

    class Losing(ScriptedStages):
        async def denoise(self, conditioning: Any, checkpoint: CheckpointRef, on_note: OnNote, *, priority: int = 0) -> Done[Any]:
            await on_note(Started())
            if (error := next(errors, None)) is not None:
                raise error
            return await super().denoise(conditioning, checkpoint, on_note)

    async with dispatching(store, files, Losing(nothing)):
        job_id = (await store.submit(NewJob(endpoint=ENDPOINT, input=INPUT, max_attempts=10))).id
        while not (job := await until(store, job_id, lambda job: job.state is not JobState.RUNNING)).state.ended:
            await execute(database, "UPDATE jobs SET not_before = NULL; NOTIFY reelray, 'work'")
            await asyncio.sleep(0.05)
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 8)


async def test_jobs_that_were_lost_beside_one_that_kills_its_replica_are_then_tried_alone(
    store: JobStore, files: FileStore, monkeypatch: pytest.MonkeyPatch
):
    class OneProcess(ScriptedStages):
        """All calls that work while the poison kills their process are lost with it."""

        def __init__(self) -> None:
            super().__init__(nothing)
            self.isolation, self.all_at_work, self.kills = Isolation(), asyncio.Barrier(4), 0

        async def preprocess(self, job_input: dict[str, Any], on_note: OnNote, *, alone: bool = False) -> Done[Any]:
            async with self.isolation.turn(alone):
                await on_note(Started())
                poison = job_input["prompt"] == "poison"
                self.kills += poison
                if not alone:
                    await self.all_at_work.wait()
                if poison or not alone:
                    raise RunnerDisconnected
                return Done(job_input, 0.1)

    monkeypatch.setattr(retry, "JITTER", 0.0)
    monkeypatch.setattr(retry, "wait_s", lambda *_: 0.0)  # else they would come back one after another
    queue = QUICK.model_copy(update={"max_in_flight": 4})
    async with dispatching(store, files, stages := OneProcess(), queue):
        ids = [(await store.submit(NewJob(ENDPOINT, INPUT | {"prompt": prompt}))).id for prompt in ("poison", *"abc")]
        poison, *others = [await ended(store, job_id) for job_id in ids]
    assert (poison.state, poison.attempt, stages.kills) == (JobState.FAILED, 3, 3)
    assert [(job.state, job.attempt) for job in others] == [(JobState.SUCCEEDED, 2)] * 3


async def test_a_runner_that_always_dies_fails_the_job_in_the_end(store: JobStore, files: FileStore):
    async def die(_: dict[str, Any]) -> None:
        raise RunnerDisconnected

    async with dispatching(store, files, ScriptedStages(die)):
        job = await ended(store, await submit(store))
    assert job.failure is not None
    assert (job.attempt, job.failure.status, job.failure.error_type) == (3, 503, "runner_disconnected")


@pytest.mark.parametrize(
    ("error", "status", "error_type"),
    [(RuntimeError("secret at 10.0.0.7"), 500, "runner_server_error"), (FileDownloadError("gone"), 422, "file_download_error")],
)
async def test_other_errors_fail_the_job_at_once(
    store: JobStore, files: FileStore, error: Exception, status: int, error_type: str
):
    async def fail(_: dict[str, Any]) -> None:
        raise error

    async with dispatching(store, files, ScriptedStages(fail)):
        job = await ended(store, await submit(store))
        after = await ended(store, await submit(store))
    assert job.failure is not None
    assert (job.attempt, job.failure.status, job.failure.error_type) == (1, status, error_type)
    assert "10.0.0.7" not in str(job.failure)
    assert after.state is JobState.FAILED, "the dispatcher lives on"


async def test_the_inference_time_is_that_of_the_stages_work(store: JobStore, files: FileStore):
    async def wait(_: dict[str, Any]) -> None:
        await asyncio.sleep(0.1)

    async with dispatching(store, files, ScriptedStages(wait)):
        job = await ended(store, await submit(store))
    receipt = {"engine": "eager", "seconds": {"preprocess": 0.25, "denoise": 0.5, "decode": 0.125}, "gpu_seconds": {}}
    # as the stages reported, without the time spent waiting
    assert job.metrics == {"inference_time": 0.25 + 0.5 + 0.125, "receipt": receipt}


async def test_a_store_that_is_away_in_the_middle_of_a_job_does_not_fail_it(store: JobStore, files: FileStore, monkeypatch):
    refused = asyncio.Event()

    async def log(*_: object) -> None:
        refused.set()
        await _away()

    async with dispatching(store, files, ScriptedStages(nothing)):
        monkeypatch.setattr(store.claims, "log", log)
        job_id = await submit(store)
        async with asyncio.timeout(PATIENCE_S):
            await refused.wait()
        monkeypatch.undo()
        job = await ended(store, job_id)
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 1), "its log waits for the store, and the render does not"


async def test_a_database_that_is_read_only_for_a_while_costs_no_job_and_no_attempt(
    store: JobStore, files: FileStore, database: str, monkeypatch: pytest.MonkeyPatch
):
    """What a failover looks like, and longer than any call waits."""
    monkeypatch.setattr("deployments.jobs.database.RIDE_OUT_S", 0.2)
    monkeypatch.setattr("deployments.jobs.database.OUTAGE_PAUSE_S", 0.1)
    go_on = asyncio.Event()

    async def wait(_: dict[str, Any]) -> None:
        await go_on.wait()

    name = urlsplit(database).path[1:]
    async with dispatching(store, files, ScriptedStages(wait), QueueSettings(lease_s=3, max_in_flight=2)):
        job_ids = [await submit(store) for _ in range(3)]
        for job_id in job_ids[:2]:
            await started(store, job_id)
        await execute(database, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        others = "pid <> pg_backend_pid() AND datname = current_database()"
        await execute(database, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")
        go_on.set()
        await asyncio.sleep(1.5)
        await execute(database, f"BEGIN READ WRITE; ALTER DATABASE {name} RESET ALL; COMMIT")
        jobs = [await ended(store, job_id) for job_id in job_ids]
    assert [(job.state, job.attempt) for job in jobs] == [(JobState.SUCCEEDED, 1)] * 3


@pytest.mark.parametrize("call", ["fail", "take", "sweep", "heartbeat", "log"])
async def test_a_mistake_of_ours_in_a_call_of_the_store_ends_at_most_that_call(
    store: JobStore, files: FileStore, monkeypatch: pytest.MonkeyPatch, call: str
):
    monkeypatch.setattr("deployments.jobs.database.OUTAGE_PAUSE_S", 0.05)
    right, mistakes = getattr(store.claims, call), iter([KeyError("ours")])

    async def mistaken(*args: Any, **kwargs: Any) -> Any:
        if mistake := next(mistakes, None):
            raise mistake
        return await right(*args, **kwargs)

    async def fail_one(job_input: dict[str, Any]) -> None:
        await asyncio.sleep(0.1)
        if job_input["seed"] == 1:
            raise RunnerFailed

    monkeypatch.setattr(store.claims, call, mistaken)
    async with dispatching(store, files, ScriptedStages(fail_one), SHORT):
        failing, good = await submit(store, seed=1), await submit(store)
        assert (await ended(store, good)).attempt == 1
        assert (await ended(store, failing)).attempt == (2 if call == "fail" else 1)


async def test_workers_renew_their_leases_after_an_outage_before_anybody_sweeps(
    store: JobStore, files: FileStore, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("deployments.dispatch.dispatcher.SWEEP_INTERVAL_S", 0.05)
    monkeypatch.setattr("deployments.jobs.database.OUTAGE_PAUSE_S", 0.1)
    sweep, heartbeat, away = store.claims.sweep, store.claims.heartbeat, True

    async def sweep_or_not() -> int:
        return await (_away() if away else sweep())

    async def heartbeat_or_not(*args: Any) -> bool:
        return await (_away() if away else heartbeat(*args))

    stages = ScriptedStages(for_ever)
    monkeypatch.setattr(store.claims, "sweep", sweep_or_not)
    monkeypatch.setattr(store.claims, "heartbeat", heartbeat_or_not)
    async with dispatching(store, files, stages, QueueSettings(lease_s=0.5)):
        job_id = await submit(store)
        await started(store, job_id)
        await asyncio.sleep(0.7)
        away = False
        await asyncio.sleep(1.0)
        job = await store.get(job_id)
    assert job is not None
    assert (job.state, job.attempt, stages.calls) == (JobState.RUNNING, 1, 1)


async def test_a_process_that_has_stood_still_renews_its_leases_before_it_sweeps(
    store: JobStore, files: FileStore, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("deployments.dispatch.dispatcher.SWEEP_INTERVAL_S", 0.01)
    renewed, heartbeat = asyncio.Event(), store.claims.heartbeat

    async def noted_heartbeat(*args: Any) -> bool:
        await asyncio.sleep(0.05)  # its turn comes later than the sweep's
        stop = await heartbeat(*args)
        renewed.set()
        return stop

    stages = ScriptedStages(for_ever)
    monkeypatch.setattr(store.claims, "heartbeat", noted_heartbeat)
    async with dispatching(store, files, stages, SHORT):
        job_id = await submit(store)
        await started(store, job_id)
        time.sleep(2 * SHORT.lease_s)  # noqa: ASYNC251  (the whole process, as on a machine that is paused)
        renewed.clear()
        await renewed.wait()
        job = await store.get(job_id)
    assert job is not None
    assert (job.state, job.attempt, stages.calls) == (JobState.RUNNING, 1, 1)


async def test_a_full_disk_costs_one_attempt_and_a_wait_and_not_the_job(
    store: JobStore, files: FileStore, database: str, monkeypatch
):
    sweep, swept = store.claims.sweep, asyncio.Event()

    async def noted_sweep() -> int:
        swept.set()
        return await sweep()

    monkeypatch.setattr("deployments.dispatch.dispatcher.SWEEP_INTERVAL_S", 0.05)
    monkeypatch.setattr(store.claims, "sweep", noted_sweep)
    monkeypatch.setattr(files, "_write", _unreachable)
    stages = ScriptedStages(nothing)
    async with dispatching(store, files, stages):
        job_id = await submit(store)
        await until(store, job_id, lambda job: job.attempt == 1 and job.state is JobState.QUEUED)
        for _ in range(3):
            swept.clear()
            await swept.wait()
        assert stages.calls == 1, "no attempt is used up while the disk stays full"
        monkeypatch.undo()
        await execute(database, "UPDATE jobs SET not_before = now()")
        job = await ended(store, job_id)
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2)


async def gone(files: FileStore, name: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            if await files.size(name) is None:
                return
            await asyncio.sleep(0.05)


async def test_a_file_is_kept_as_long_as_its_caller_wished_and_then_deleted(
    store: JobStore, files: FileStore, database: str, monkeypatch
):
    monkeypatch.setattr("deployments.dispatch.dispatcher.EXPIRY_INTERVAL_S", 0.1)
    async with dispatching(store, files, ScriptedStages(nothing)):
        for wish_s, kept_days in ((None, 7), (86_400.0, 1), (1e9, 366)):
            new = NewJob(endpoint=ENDPOINT, input=INPUT, files_s=wish_s)
            job = await ended(store, (await store.submit(new)).id)
            assert job.result is not None
            name = job.result["video"]["url"].removeprefix("/files/")
            await execute(database, f"UPDATE stored_files SET expires_at = expires_at - interval '{kept_days} days 1 second'")
            await gone(files, name)


async def test_a_job_whose_caller_wants_no_retry_ends_with_its_first_error(store: JobStore, files: FileStore, monkeypatch):
    monkeypatch.setattr(files, "_write", _unreachable)
    async with dispatching(store, files, ScriptedStages(nothing)):
        job = await ended(store, (await store.submit(NewJob(endpoint=ENDPOINT, input=INPUT, max_attempts=1))).id)
    assert job.failure is not None
    assert (job.attempt, job.failure.status, job.failure.body["detail"]) == (1, 500, "A file could not be stored.")


async def test_each_condition_of_a_retry_config_has_its_own_budget(store: JobStore, files: FileStore):
    """Three replicas die, of which the caller allows two; the stalled one in between has a budget of its own."""
    errors = iter([RunnerDisconnected(), RunnerStalled(), RunnerDisconnected(), RunnerDisconnected()])

    async def fail(_: dict[str, Any]) -> None:
        raise next(errors)

    stages = ScriptedStages(fail)
    new = NewJob(endpoint=ENDPOINT, input=INPUT, retries={"server_error": 2, "timeout": 1})
    async with dispatching(store, files, stages):
        job_id = (await store.submit(new)).id
        async with asyncio.timeout(PATIENCE_S):
            while (job := await store.get(job_id)) and not job.state.ended:
                await store.database.fetch("UPDATE jobs SET not_before = now() WHERE not_before IS NOT NULL")
                await asyncio.sleep(0.05)
    assert job is not None
    assert job.failure is not None
    assert (job.attempt, job.failure.error_type, stages.calls) == (4, "runner_disconnected", 4)


def _unreachable(*_: object) -> NoReturn:
    raise Exception("EndpointConnectionError: botocore's errors are no OSErrors")


def with_deadlines(**deadlines: float) -> QueueSettings:
    return QueueSettings.model_validate({**QUICK.model_dump(), "deadlines": {ENDPOINT: deadlines}})


async def test_a_job_past_its_run_deadline_fails_at_once_and_frees_the_stage(store: JobStore, files: FileStore):
    stages = ScriptedStages(for_ever)
    async with dispatching(store, files, stages, with_deadlines(run_s=0.3)):
        job = await ended(store, await submit(store))
        assert not stages.running
    assert job.failure is not None
    assert (job.attempt, job.failure.status, job.failure.error_type) == (1, 504, "generation_timeout")
    assert job.failure.body["detail"][0]["type"] == "generation_timeout"


async def test_an_attempt_that_stands_still_is_stopped_and_the_job_tried_again(store: JobStore, files: FileStore):
    queue = with_deadlines(idle_s=0.2)

    async def stall_once(job_input: dict[str, Any]) -> None:
        if queue.deadlines:
            queue.deadlines.clear()  # the next attempt has all the time in the world
            await for_ever(job_input)

    async with dispatching(store, files, ScriptedStages(stall_once), queue):
        job = await ended(store, await submit(store))
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2)


async def test_a_job_that_always_stands_still_fails_in_the_end(store: JobStore, files: FileStore):
    async with dispatching(store, files, ScriptedStages(for_ever), with_deadlines(idle_s=0.1)):
        job = await ended(store, await submit(store))
    assert job.failure is not None
    assert (job.attempt, job.failure.error_type) == (3, "runner_connection_timeout")


async def test_a_job_that_waits_for_a_replica_does_not_stand_still(
    store: JobStore, files: FileStore, demo_settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    local_stages = LocalStages(demo_settings)
    local_stages.replicas.kill("replica-0")
    now, renewed, heartbeat, denoise = [0.0], asyncio.Event(), store.claims.heartbeat, local_stages.denoise
    monkeypatch.setattr("deployments.dispatch.dispatcher.Watchdog", lambda deadlines: Watchdog(deadlines, lambda: now[0]))

    async def wait_long(*args: Any, **options: Any) -> Any:
        now[0] += 1e6
        return await denoise(*args, **options)

    async def noted_heartbeat(*args: Any) -> bool:
        if now[0]:
            renewed.set()
        return await heartbeat(*args)

    monkeypatch.setattr(local_stages, "denoise", wait_long)
    monkeypatch.setattr(store.claims, "heartbeat", noted_heartbeat)
    queue = SHORT.model_copy(update={"deadlines": {ENDPOINT: Deadlines(run_s=1e9, idle_s=0.5)}})
    async with dispatching(store, files, local_stages, queue):
        job_id = await submit(store, num_inference_steps=1)
        async with asyncio.timeout(PATIENCE_S):
            for _ in range(3):
                await renewed.wait()
                renewed.clear()
        job = await store.get(job_id)
        assert job is not None
        assert (job.state, job.attempt) == (JobState.RUNNING, 1)
        local_stages.replicas.add("new", local_stages.denoise_replica)
        assert (await ended(store, job_id)).state is JobState.SUCCEEDED


async def test_a_long_job_keeps_its_lease(store: JobStore, files: FileStore):
    async def outlast_three_leases(_: dict[str, Any]) -> None:
        await asyncio.sleep(3 * SHORT.lease_s)

    async with dispatching(store, files, ScriptedStages(outlast_three_leases), SHORT):
        job = await ended(store, await submit(store))
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 1)


async def test_no_more_jobs_are_worked_on_than_there_is_room_for(store: JobStore, files: FileStore):
    room = asyncio.Barrier(QUICK.max_in_flight)

    async def pause(_: dict[str, Any]) -> None:
        await room.wait()
        await asyncio.sleep(0.05)

    stages = ScriptedStages(pause)
    async with dispatching(store, files, stages):
        for job in [await submit(store) for _ in range(8)]:
            assert (await ended(store, job)).state is JobState.SUCCEEDED
    assert stages.peak == ROOM


async def test_when_replicas_come_more_jobs_are_claimed_at_once(store: JobStore, files: FileStore):
    class Growing(ScriptedStages):
        def watch_replicas(self, changed: Callable[[int], None]) -> None:
            self.changed = changed

    stages = Growing(for_ever)
    async with dispatching(store, files, stages, QUICK.model_copy(update={"max_in_flight": None})):
        ids = [await submit(store) for _ in range(8)]
        await started(store, ids[2])
        await asyncio.sleep(0.2)
        assert stages.running == 3
        stages.changed(4)
        await started(store, ids[5])
        assert stages.running == 6


async def test_one_endpoints_long_jobs_do_not_hold_up_anothers(store: JobStore, files: FileStore):
    other = "fal-ai/controlnext"
    long, short = ScriptedStages(for_ever), ScriptedStages(nothing)
    task = asyncio.create_task(Dispatcher(store, files, {other: long, ENDPOINT: short}, QUICK, RetentionSettings()).run())
    waiting = [await store.submit(NewJob(endpoint=other, input=INPUT, max_attempts=1)) for _ in range(ROOM + 1)]
    assert (await ended(store, await submit(store))).state is JobState.SUCCEEDED
    for job in waiting[:ROOM]:
        await started(store, job.id)
    assert long.peak == ROOM
    task.cancel()
    await asyncio.wait([task])


async def test_a_dispatcher_that_shuts_down_gives_its_jobs_back_at_no_cost(store: JobStore, files: FileStore):
    async with dispatching(store, files, ScriptedStages(for_ever)):
        job_id = await submit(store)
        await started(store, job_id)
    job = await store.get(job_id)
    assert job is not None
    assert (job.state, job.attempt) == (JobState.QUEUED, 0)
    async with dispatching(store, files, ScriptedStages(nothing)):
        assert (await ended(store, job_id)).state is JobState.SUCCEEDED


async def test_a_dead_dispatchers_job_is_swept_up_by_another(store: JobStore, files: FileStore):
    job_id = await submit(store)
    assert await store.claims.take([ENDPOINT], lease_s=0.3)  # by a dispatcher that then dies
    async with dispatching(store, files, ScriptedStages(nothing)):
        job = await ended(store, job_id)
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2)


async def test_an_attempt_that_lost_its_lease_stops_and_changes_nothing(store: JobStore, files: FileStore, monkeypatch):
    monkeypatch.setattr("deployments.jobs.database.OUTAGE_PAUSE_S", 0.05)
    stages = ScriptedStages(for_ever)
    async with dispatching(store, files, stages, SHORT):
        job_id = await submit(store)
        await started(store, job_id)
        stages.act = nothing  # for later attempts
        with monkeypatch.context() as cut:
            cut.setattr(store.claims, "heartbeat", _away)  # the network between the dispatcher and the store is cut
            await until(store, job_id, lambda job: (job.attempt == 1 and job.state is JobState.QUEUED) or job.attempt > 1)
        job = await ended(store, job_id)
        async with asyncio.timeout(PATIENCE_S):
            while stages.running:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    assert job.state is JobState.SUCCEEDED
    assert job.attempt > 1


async def _away(*_: object) -> bool:
    await asyncio.sleep(0.05)
    raise StoreAway


async def test_a_store_that_is_away_for_a_while_stops_nothing(store: JobStore, files: FileStore, monkeypatch):
    monkeypatch.setattr("deployments.jobs.database.OUTAGE_PAUSE_S", 0.05)
    monkeypatch.setattr(store.claims, "take", _away)
    monkeypatch.setattr(store.claims, "sweep", _away)
    async with dispatching(store, files, ScriptedStages(nothing)):
        job_id = await submit(store)
        await asyncio.sleep(0.3)
        monkeypatch.undo()
        assert (await ended(store, job_id)).state is JobState.SUCCEEDED


async def test_two_dispatchers_share_the_work_and_do_each_job_once(store: JobStore, files: FileStore):
    done: list[int] = []

    async def count(job_input: dict[str, Any]) -> None:
        done.append(job_input["seed"])
        await asyncio.sleep(0.01)

    async with dispatching(store, files, ScriptedStages(count)), dispatching(store, files, ScriptedStages(count)):
        for job in [await submit(store, seed=seed) for seed in range(30)]:
            assert (await ended(store, job)).state is JobState.SUCCEEDED
    assert sorted(done) == list(range(30))


class ChattyStages(ScriptedStages):
    """Denoising sends a hundred thousand notes, half progress and half warnings, then calls `act`."""

    notes = 100_000

    async def denoise(self, conditioning: Any, checkpoint: CheckpointRef, on_note: OnNote, *, priority: int = 0) -> Done[Any]:
        for k in range(self.notes // 2):
            progress = StageProgress("denoise", Progress("step", k, self.notes // 2))
            await on_note(Note(progress.message, progress=progress))
            await on_note(Note(f"warning {k}", "WARN"))
            if k % 100 == 0:
                await asyncio.sleep(0)  # notes from another process would also yield to the event loop
        return await super().denoise(conditioning, checkpoint, on_note)


async def test_a_chatty_job_floods_nothing_and_another_beside_it_goes_on(store: JobStore, files: FileStore):
    chatty, calm = "fal-ai/controlnext", ENDPOINT
    stages: dict[str, Stages] = {chatty: ChattyStages(nothing), calm: ScriptedStages(nothing)}
    began = time.monotonic()
    dispatcher = asyncio.create_task(Dispatcher(store, files, stages, QUICK, RetentionSettings()).run())
    loud = (await store.submit(NewJob(endpoint=chatty, input=INPUT, max_attempts=1))).id
    await until(store, loud, lambda job: job.attempt == 1)
    for _ in range(3):
        assert (await ended(store, await submit(store))).state is JobState.SUCCEEDED
    assert (await ended(store, loud)).state is JobState.SUCCEEDED, "in one attempt"
    lines = await store.logs(loud)
    assert [line.seq for line in lines] == list(range(1, len(lines) + 1))
    assert len(lines) <= 2001
    of_progress = [line.progress["step"]["done"] for line in lines if line.progress]
    assert of_progress[0] == 0
    assert of_progress == sorted(of_progress)
    assert len(of_progress) < 60 + time.monotonic() - began
    dispatcher.cancel()
    await asyncio.wait([dispatcher])


async def test_notes_that_are_not_written_keep_an_attempt_from_standing_still(store: JobStore, files: FileStore):
    class Steady(ScriptedStages):
        async def denoise(self, conditioning: Any, checkpoint: CheckpointRef, on_note: OnNote, *, priority: int = 0) -> Done[Any]:
            for k in range(200):
                await on_note(Note("", progress=StageProgress("denoise", Progress("step", k, 200))))
                await asyncio.sleep(0.01)
            return Done(conditioning, 0.5)

    async with dispatching(store, files, Steady(nothing), with_deadlines(idle_s=1.0)):
        job = await ended(store, await submit(store))
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 1)


async def test_a_retried_job_goes_on_in_the_same_log(store: JobStore, files: FileStore):
    deaths = iter([RunnerDisconnected()])

    async def die_once(_: dict[str, Any]) -> None:
        if death := next(deaths, None):
            raise death

    async with dispatching(store, files, ScriptedStages(die_once)):
        job_id = await submit(store)
        assert (await ended(store, job_id)).attempt == 2
    assert [(line.seq, line.message) for line in await store.logs(job_id)] == [(1, "step 1/1"), (2, "step 1/1")]
