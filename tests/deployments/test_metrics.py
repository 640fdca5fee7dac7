"""What the service counts, recorded by the code that does the work."""

import asyncio
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from deployments import metrics
from deployments.dispatch.dispatcher import Dispatcher
from deployments.dispatch.queue_gauges import QueueGauges
from deployments.files.file_store import FileStore
from deployments.jobs.database import StoreAway
from deployments.jobs.job import Job, NewJob
from deployments.jobs.store import JobStore
from deployments.jobs.work import StageStatus, Work
from deployments.metrics import Metric
from deployments.settings import QueueSettings, RetentionSettings
from deployments.stages.protocol import CheckpointRef, Done, OnNote, Started
from deployments.webhooks.outbox import Outbox
from engines.errors import ImageLoadError, RunnerDisconnected
from engines.spec import Clip
from tests.fakes import CLIP, ENDPOINT, ScriptedStages, for_ever

OTHER = "fal-ai/controlnext"
WEIGHTS = {"base": {"repo": "a/b", "revision": "1e9f"}}


class Recorded:
    """Every value that was recorded, in order."""

    def __init__(self) -> None:
        self.values: list[tuple[str, float, dict[str, str]]] = []

    def __call__(self, metric: Metric, value: float, tags: Mapping[str, str]) -> None:
        self.values.append((metric.name, value, dict(tags)))

    def of(self, metric: Metric, **tags: str) -> list[float]:
        """What was recorded of a metric with (at least) these tags."""
        return [value for name, value, has in self.values if name == metric.name and tags.items() <= has.items()]


@pytest.fixture
def recorded() -> Iterator[Recorded]:
    export = Recorded()
    metrics.export_to(export)
    yield export
    metrics.stop_export(export)


class OnGpus(ScriptedStages):
    """Stages as they answer on GPUs. Denoising is spread over replicas."""

    async def denoise(self, conditioning: Any, checkpoint: CheckpointRef, on_note: OnNote, *, priority: int = 0) -> Done[Any]:
        await on_note(Started())
        done = await super().denoise(conditioning, checkpoint, on_note, priority=priority)
        return replace(done, gpu_seconds=3.0, receipt={"units": 104, "replicas": 8})

    async def decode(self, latents: Any, on_note: OnNote) -> Done[Clip]:
        return Done(CLIP, 0.125, 0.125, {"weights": WEIGHTS})


async def test_a_job_is_counted_from_its_wait_to_its_receipt(store: JobStore, files: FileStore, recorded: Recorded) -> None:
    async def act(_: object) -> None:
        pass

    job = await ended(store, files, OnGpus(act))
    assert 0 <= recorded.of(metrics.WAIT, endpoint=ENDPOINT)[0] < 20
    assert recorded.of(metrics.STAGE, stage="denoise") == [0.5]
    assert len(recorded.of(metrics.STAGE_WAIT, stage="denoise")) == 1
    assert recorded.of(metrics.GPU, stage="denoise") == [3.0]
    assert recorded.of(metrics.GPU, stage="preprocess") == []
    assert recorded.of(metrics.JOB_GPU, endpoint=ENDPOINT) == [3.125]
    assert recorded.of(metrics.ATTEMPTS) == recorded.of(metrics.ATTEMPTS, outcome="succeeded") == [1]
    assert job.metrics["receipt"] == {
        "engine": "eager",
        "seconds": {"preprocess": 0.25, "denoise": 0.5, "decode": 0.125},
        "gpu_seconds": {"denoise": 3.0, "decode": 0.125},
        "units": 104,
        "replicas": 8,
        "weights": WEIGHTS,
    }


async def test_retries_and_failures_are_counted_by_their_reason(store: JobStore, files: FileStore, recorded: Recorded) -> None:
    errors: list[Exception] = [RunnerDisconnected(), ImageLoadError("damaged", ("body", "x"))]

    async def act(_: object) -> None:
        raise errors.pop(0)

    await ended(store, files, ScriptedStages(act))
    outcomes = [tags["outcome"] for name, _, tags in recorded.values if name == metrics.ATTEMPTS.name]
    assert outcomes == ["retried", "rejected"]
    assert recorded.of(metrics.RETRIES, stage="denoise", reason="RunnerDisconnected") == recorded.of(metrics.RETRIES) == [1]


async def test_a_cancel_is_counted_as_it_was_asked_for_and_as_it_ended(
    store: JobStore, files: FileStore, recorded: Recorded
) -> None:
    stages = ScriptedStages(for_ever)
    queued = await store.submit(NewJob(ENDPOINT, {}))
    await store.request_cancel(queued.id)
    async with asyncio.timeout(20):
        ending = asyncio.create_task(ended(store, files, stages))
        while not stages.running:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await store.request_cancel((await store.recent(1))[0].id)
        await ending
    assert recorded.of(metrics.CANCELS, state="queued") == recorded.of(metrics.CANCELS, state="running") == [1]
    assert recorded.of(metrics.ATTEMPTS, outcome="cancelled") == [1]


async def test_the_queues_gauges_are_the_databases(store: JobStore, recorded: Recorded) -> None:
    for _ in range(3):
        await store.submit(NewJob(ENDPOINT, {}))
    claim = await store.claims.take([ENDPOINT], 60)
    assert claim is not None
    await store.claims.requeue(claim, "later", counted=True, wait_s=60)
    await store.claims.take([ENDPOINT], 60)
    await store.pause(OTHER)
    await QueueGauges(store, Outbox(store.database), [ENDPOINT, OTHER]).set()
    read = [recorded.of(each, endpoint=ENDPOINT) for each in (metrics.QUEUED, metrics.DELAYED, metrics.RUNNING, metrics.PAUSED)]
    assert read == [[2], [1], [1], [0]]
    assert 0 < recorded.of(metrics.OLDEST, endpoint=ENDPOINT)[0] < 20
    assert recorded.of(metrics.QUEUED, endpoint=OTHER) == recorded.of(metrics.OLDEST, endpoint=OTHER) == [0]
    assert recorded.of(metrics.PAUSED, endpoint=OTHER) == recorded.of(metrics.DATABASE) == [1]
    assert recorded.of(metrics.WEBHOOKS) == recorded.of(metrics.OLDEST_WEBHOOK) == [0]


async def test_the_scalings_gauges_and_decisions_are_what_the_policy_wrote(store: JobStore, recorded: Recorded) -> None:
    gauges = QueueGauges(store, Outbox(store.database), [ENDPOINT])
    for target in (2, 5, 5, 1):
        status = StageStatus(ENDPOINT, "denoise", unit_s=0.2, ready_s=30.0, backlog_s=12.5, replicas=2, target=target)
        await Work(store.database, [ENDPOINT]).save([status])
        await gauges.set()
    assert recorded.of(metrics.TARGET, endpoint=ENDPOINT, stage="denoise") == [2, 5, 5, 1]
    assert set(recorded.of(metrics.REPLICAS)) == {2}
    assert set(recorded.of(metrics.BACKLOG)) == {12.5}
    assert set(recorded.of(metrics.READY)) == {30}
    assert all(0 <= age_s < 20 for age_s in recorded.of(metrics.SCALING_AGE))
    directions = [tags["direction"] for name, _, tags in recorded.values if name == metrics.SCALINGS.name]
    assert directions == ["up", "down"]


async def test_a_database_that_is_away_is_a_gauge_of_0_and_ends_nothing(recorded: Recorded, store: JobStore) -> None:
    class Away:
        async def backlog(self) -> tuple[int, float]:
            raise StoreAway("gone")

    gauges = asyncio.create_task(QueueGauges(store, Away(), [ENDPOINT]).run())
    async with asyncio.timeout(20):
        while not recorded.of(metrics.DATABASE):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert recorded.of(metrics.DATABASE) == [0]
    assert not gauges.done()
    gauges.cancel()
    with suppress(asyncio.CancelledError):
        await gauges


def test_names_and_tags_are_prometheus_and_no_tag_is_a_callers() -> None:
    names = [metric.name for metric in metrics.CATALOGUE]
    assert len(set(names)) == len(names) > 20
    for metric in metrics.CATALOGUE:
        assert re.fullmatch("reelray_[a-z_]+", metric.name)
        assert not metric.name.endswith(("_total", "_count", "_sum", "_bucket"))
        assert (metric.kind == "histogram") == bool(metric.boundaries_s)
        assert list(metric.boundaries_s) == sorted(set(metric.boundaries_s))
        assert set(metric.tags) <= {"endpoint", "stage", "outcome", "state", "reason", "direction"}


def test_a_metric_is_not_recorded_with_other_tags_than_its_own() -> None:
    with pytest.raises(AssertionError, match="endpoint"):
        metrics.QUEUED.record(1, endpoint=ENDPOINT, owner="somebody")


async def ended(store: JobStore, files: FileStore, stages: ScriptedStages) -> Job:
    """A job, once a dispatcher with these stages has ended it."""
    dispatcher = Dispatcher(store, files, {ENDPOINT: stages}, QueueSettings(), RetentionSettings())
    task = asyncio.create_task(dispatcher.run())
    job_id = (await store.submit(NewJob(ENDPOINT, {"prompt": "a red ball"}))).id
    async with asyncio.timeout(20), store.watch(job_id) as changes:
        while not (job := await store.get(job_id)) or not job.state.ended:
            await changes.changed(0.2)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    return job
