"""Interrupted jobs resume instead of starting over: with a dispatcher, the real store and the real models."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn
from uuid import UUID

import pytest

from deployments.files.checkpoints import Saving
from deployments.files.file_store import FileStore
from deployments.hosting.demo_weights import demo_inputs
from deployments.jobs.job import Job, JobState, NewJob
from deployments.jobs.store import JobStore
from deployments.settings import Settings
from engines.errors import RunnerDisconnected
from engines.spec import Latents
from tests.conftest import execute
from tests.deployments.dispatch.test_dispatcher import QUICK, dispatching, ended, started
from tests.fakes import ENDPOINT, LocalStages, held_after
from tests.patience import PATIENCE_S

CONTROLNEXT = "fal-ai/controlnext"
INPUTS: dict[str, dict[str, Any]] = {
    ENDPOINT: demo_inputs()[ENDPOINT] | {"num_inference_steps": 12, "guidance_scale": 1},
    CONTROLNEXT: demo_inputs()[CONTROLNEXT]
    | {"num_inference_steps": 4, "guidance_scale": 1, "height": 256, "max_frame_num": 6, "batch_frames": 4},
}


@pytest.fixture
def settings(demo_settings: Settings, tmp_path: Path) -> Settings:
    """The demo's weights and the test's own file folder. A checkpoint per step, unless the last one is still being written."""
    queue = QUICK.model_copy(update={"checkpoint_s": 1e-6})
    return demo_settings.model_copy(update={"files": str(tmp_path / "files"), "queue": queue})


@pytest.fixture
def replicas(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Callable[..., LocalStages]:
    """Creates new replicas of an endpoint, as after a deploy or a restart."""
    monkeypatch.setattr("deployments.dispatch.dispatcher.RELEASE_S", 0.0)  # in one process, a cancel waits for the stage
    return lambda endpoint=ENDPOINT: LocalStages(settings, endpoint)


async def submit(store: JobStore, endpoint: str = ENDPOINT, steps: int = 0, **options: Any) -> UUID:
    job_input = INPUTS[endpoint] | ({"num_inference_steps": steps} if steps else {})
    return (await store.submit(NewJob(endpoint, job_input, max_attempts=3, **options))).id


async def mp4_of(files: FileStore, job: Job) -> bytes:
    assert job.state is JobState.SUCCEEDED, job.failure
    assert job.result is not None
    name = job.result["video"]["url"].removeprefix("/files/")
    return b"".join([chunk async for chunk in files.read(name, 0, await files.size(name) or 0)])


async def lines(store: JobStore, job_id: UUID) -> list[str]:
    return [line.message for line in await store.logs(job_id)]


def work(store: JobStore, files: FileStore, stages: LocalStages, endpoint: str = ENDPOINT) -> Any:
    return dispatching(store, files, stages, QUICK, endpoint)


class Counted:
    """Wraps a stage and counts its calls."""

    def __init__(self, replica: Any):
        self.stage = replica.stage
        self.calls = 0
        replica.stage = self

    def _call(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.calls += 1
            return getattr(self.stage, name)(*args, **options)

        return call

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.stage, name)
        return self._call(name) if callable(found) else found


@pytest.mark.parametrize("endpoint", [ENDPOINT, CONTROLNEXT])
async def test_a_released_job_goes_on_at_its_last_step_with_the_bits_of_an_undisturbed_one(
    store: JobStore, files: FileStore, replicas: Callable[..., LocalStages], endpoint: str
):
    stages = replicas(endpoint)
    async with work(store, files, stages, endpoint):
        undisturbed = await mp4_of(files, await ended(store, await submit(store, endpoint)))
        held_after(stages.denoise_replica, step=3)
        job_id = await submit(store, endpoint)
        await started(store, job_id, "step 2/")
    released = await store.get(job_id)
    assert released is not None
    assert (released.state, released.attempt) == (JobState.QUEUED, 0)
    before = await lines(store, job_id)
    async with work(store, files, replicas(endpoint), endpoint):
        job = await ended(store, job_id)
    told = (await lines(store, job_id))[len(before) :]
    steps = INPUTS[endpoint]["num_inference_steps"]
    resumed = next(line for line in told if line.startswith("resumed"))
    at = int(resumed.removeprefix("resumed at step ").partition("/")[0])
    assert 2 <= at < steps
    worked = [line.removeprefix("denoise: ").partition(",")[0] for line in told if line.startswith("denoise: ")]
    assert list(dict.fromkeys(worked)) == [f"step {i}/{steps}" for i in range(at, steps + 1)]
    assert await mp4_of(files, job) == undisturbed
    assert job.attempt == 1


async def test_a_job_whose_runner_died_goes_on_at_a_step_that_was_kept(
    store: JobStore, files: FileStore, replicas: Callable[..., LocalStages], monkeypatch: pytest.MonkeyPatch
):
    finish, died = Saving.finish, []

    async def die_once(saving: Saving, latents: Latents) -> None:
        if not died:
            died.append(1)
            raise RunnerDisconnected
        await finish(saving, latents)

    async with work(store, files, replicas()):
        undisturbed = await mp4_of(files, await ended(store, await submit(store, steps=4)))
        monkeypatch.setattr(Saving, "finish", die_once)
        job_id = await submit(store, steps=4)
        job = await ended(store, job_id)
    assert await mp4_of(files, job) == undisturbed
    assert job.attempt == 2
    assert any(line.startswith("resumed at step") for line in await lines(store, job_id))


async def test_a_decode_that_fails_repeats_nothing_before_it(
    store: JobStore, files: FileStore, replicas: Callable[..., LocalStages], monkeypatch: pytest.MonkeyPatch
):
    stages = replicas()
    async with work(store, files, stages):
        undisturbed = await mp4_of(files, await ended(store, await submit(store, steps=4)))
        encoded, begun = Counted(stages.preprocess_replica), Counted(stages.denoise_replica)
        decode, died = stages.decode, []

        async def die_once(*args: Any) -> Any:
            if not died:
                died.append(1)
                raise RunnerDisconnected
            return await decode(*args)

        monkeypatch.setattr(stages, "decode", die_once)
        job_id = await submit(store, steps=4)
        job = await ended(store, job_id)
    assert await mp4_of(files, job) == undisturbed
    assert (job.attempt, encoded.calls, begun.calls) == (2, 1, 1)
    assert (await lines(store, job_id))[-1] == "resumed after the last step"


async def test_a_clip_that_could_not_be_stored_is_not_denoised_again(
    store: JobStore, files: FileStore, replicas: Callable[..., LocalStages], monkeypatch: pytest.MonkeyPatch
):
    stages = replicas()
    begun = Counted(stages.denoise_replica)
    put, tried = files.put, []

    async def full_once(*args: Any) -> Any:
        if not tried:
            tried.append(1)
            raise OSError("No space left on device")
        return await put(*args)

    monkeypatch.setattr(files, "put", full_once)
    monkeypatch.setattr("deployments.dispatch.dispatcher.next_attempt_in", lambda *_: 0.0)
    async with work(store, files, stages):
        job = await ended(store, await submit(store, steps=4))
    assert (job.state, job.attempt, begun.calls) == (JobState.SUCCEEDED, 2, 1)


async def test_a_file_store_that_refuses_checkpoints_costs_no_job(
    store: JobStore, files: FileStore, replicas: Callable[..., LocalStages], monkeypatch: pytest.MonkeyPatch
):
    async def refuse(*_: Any) -> NoReturn:
        raise OSError("No space left on device")

    monkeypatch.setattr("deployments.files.file_store.FileStore.put_checkpoint", refuse)
    async with work(store, files, replicas()):
        job = await ended(store, await submit(store, steps=4))
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 1)


@pytest.fixture
async def left(settings: Settings) -> Callable[[], list[Path]]:
    return lambda: list(Path(settings.files_url).glob("checkpoints/*"))


@pytest.mark.parametrize(("end", "store_io"), [("success", True), ("success", False), ("cancel", True), ("failure", False)])
async def test_ten_minutes_after_its_end_nothing_is_left_of_a_jobs_checkpoint(
    store: JobStore,
    files: FileStore,
    replicas: Callable[..., LocalStages],
    database: str,
    left: Callable[[], list[Path]],
    monkeypatch: pytest.MonkeyPatch,
    end: str,
    store_io: bool,
):
    monkeypatch.setattr("deployments.dispatch.dispatcher.EXPIRY_INTERVAL_S", 0.05)
    stages = replicas()
    if end == "failure":
        monkeypatch.setattr(stages, "decode", _fail)
    async with work(store, files, stages):
        job_id = await submit(store, steps=12 if end == "cancel" else 4, store_io=store_io)
        await started(store, job_id)
        if end == "cancel":
            await store.request_cancel(job_id)
        assert (await ended(store, job_id)).state.value == {"success": "succeeded", "cancel": "cancelled"}.get(end, "failed")
        async with asyncio.timeout(PATIENCE_S):
            await until(left)  # a cancelled stage still writes its last step
        await asyncio.sleep(0.2)
        assert left(), "kept, as its stage may still be writing"
        await execute(database, "UPDATE stored_files SET expires_at = expires_at - interval '10 minutes'")
        async with asyncio.timeout(PATIENCE_S):
            await until(lambda: not left())


async def until(met: Callable[[], Any]) -> None:
    while not met():  # noqa: ASYNC110  (there is no notification of files)
        await asyncio.sleep(0.05)


async def _fail(*_: Any) -> NoReturn:
    raise RuntimeError


async def test_a_job_is_released_after_a_pause_in_which_its_stage_can_keep_the_last_step(
    store: JobStore, files: FileStore, replicas: Callable[..., LocalStages], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("deployments.dispatch.dispatcher.RELEASE_S", 3600.0)
    async with work(store, files, replicas()):
        job_id = await submit(store)
        await started(store, job_id)
    async with work(store, files, replicas()):
        await asyncio.sleep(0.3)
        job = await store.get(job_id)
        assert job is not None
        assert job.state is JobState.QUEUED
