"""What the autoscaling reads of the jobs, on the real database."""

from dataclasses import replace

import pytest

from deployments.jobs.job import Claim, NewJob
from deployments.jobs.store import JobStore
from deployments.jobs.work import Arrived, Measured, Running, StageStatus, Waiting, Work, stages

CLIPS, VIDEOS = "fal-ai/clips", "fal-ai/videos"
VIDEO = NewJob(VIDEOS, {}, units=(240, 650, 240), parallel=26)


@pytest.fixture
def work(store: JobStore) -> Work:
    return Work(store.database, [CLIPS, VIDEOS])


async def claimed(store: JobStore, endpoint: str = VIDEOS) -> Claim:
    claim = await store.claims.take([endpoint], 60)
    assert claim is not None
    return claim


async def test_what_waits_is_added_up_by_endpoint(store: JobStore, work: Work):
    assert await work.waiting() == {}
    for new in (VIDEO, replace(VIDEO, units=(10, 50, 10), parallel=4, priority=1), NewJob("fal-ai/another", {})):
        await store.submit(new)
    assert await work.waiting() == {VIDEOS: Waiting(2, (250, 700, 250), 30)}
    await store.pause(VIDEOS)
    assert await work.waiting() == {}
    assert await work.arrived([60]) == {}


async def test_a_job_that_waits_for_another_attempt_does_not_count(store: JobStore, work: Work):
    await store.submit(VIDEO)
    await store.claims.requeue(await claimed(store), "", counted=True, wait_s=60)
    assert await work.waiting() == {}


async def test_of_a_limited_key_no_more_counts_than_may_run(store: JobStore, work: Work):
    limited = (await store.keys.create("limited", 3)).partition(":")[0]
    for owner in (limited,) * 10 + ("another",) * 2:
        await store.submit(replace(VIDEO, owner=owner))
    assert (await work.waiting())[VIDEOS].jobs == 5
    await store.claims.take([VIDEOS], 60)  # the limited key's, being first
    assert (await work.waiting())[VIDEOS].jobs == 4
    units = (480, 1300, 480)  # of the key without a limit
    assert await work.arrived([60, 600, 0]) == {VIDEOS: [Arrived(60, 2, units), Arrived(600, 2, units)]}


async def test_a_running_job_has_the_progress_that_it_told_last(store: JobStore, work: Work):
    await store.submit(VIDEO)
    claim = await claimed(store)
    assert await work.running() == [Running(VIDEOS, (240, 650, 240), 26)]
    for fraction in (0.25, 0.5):
        await store.claims.log(claim, "x", progress={"stage": "denoise", "fraction": fraction})
    await store.claims.log(claim, "not progress")
    assert await work.running() == [Running(VIDEOS, (240, 650, 240), 26, "denoise", 0.5)]


async def test_each_job_that_ended_without_a_break_is_measured_once(store: JobStore, work: Work):
    """A job that was given back may have gone on from a checkpoint: what its last attempt took is not the whole."""
    seconds = {"preprocess": 1.0, "denoise": 6.0, "decode": 2.0}
    for _ in range(4):
        await store.submit(VIDEO)
    await store.claims.requeue(await claimed(store), "", counted=False)
    of_one, spread = {"seconds": seconds}, {"seconds": seconds, "replica_seconds": 60.0}
    for receipt in (of_one, of_one, spread, None):
        await store.claims.succeed(await claimed(store), {}, {"receipt": receipt} if receipt else {})
    assert await work.measured() == [Measured(VIDEOS, VIDEO.units, each) for each in (seconds, seconds | {"denoise": 60.0})]
    assert await work.measured() == []


async def test_what_is_known_of_the_stages_outlives_the_policy(store: JobStore, work: Work):
    for backlog_s in (5.0, 7.0):
        rows = [StageStatus(VIDEOS, stage, 0.2, 30.0, backlog_s, 2, 3) for stage in ("denoise", "decode")]
        await work.save(rows)
    kept = await stages(store.database)
    assert [status for status, _ in kept] == rows
    assert all(0 <= age_s < 60 for _, age_s in kept)
