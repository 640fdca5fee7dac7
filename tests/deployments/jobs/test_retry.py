from dataclasses import replace
from uuid import UUID

import asyncpg
import pytest

from deployments.jobs.job import Claim, Job, JobState, NewJob
from deployments.jobs.retry import POLICIES, next_attempt_in, policy_of, wait_s
from deployments.jobs.store import JobStore
from engines import errors
from engines.errors import (
    FileDownloadError,
    GenerationTimeout,
    ReelrayError,
    RunnerDisconnected,
    RunnerFailed,
    RunnerOutOfMemory,
    RunnerStalled,
    StorageFailed,
)

ENDPOINT = "fal-ai/fake"
NEW = NewJob(ENDPOINT, {})


def waits(error: ReelrayError, max_attempts: int) -> list[float | None]:
    return [next_attempt_in(error, attempt, max_attempts) for attempt in range(1, max_attempts + 1)]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RunnerDisconnected(), [0, 1, 2, 4, 8, 16, 30, 30, 30, None]),
        (RunnerStalled(), [0, 1, 2, 4, 8, 16, 30, 30, 30, None]),
        (RunnerOutOfMemory(), [0, 1, 2, 4, 8, 16, 30, 30, 30, None]),
        (StorageFailed(), [5, 10, 20, 40, 80, 160, 300, 300, 300, None]),
        (RunnerFailed(), [None] * 10),
        (FileDownloadError(), [None] * 10),
    ],
)
def test_waits_of_a_job_with_ten_attempts(error: ReelrayError, expected: list[float | None]) -> None:
    assert waits(error, 10) == expected


@pytest.mark.parametrize("kind", [RunnerDisconnected, RunnerStalled])
def test_the_third_attempt_that_is_lost_in_the_same_stage_is_the_last(kind: type[ReelrayError]) -> None:
    assert [next_attempt_in(kind(), 4, 10, losses) for losses in (0, 1, 2, 3)] == [4, 4, 4, None]


def test_a_job_for_which_the_memory_was_not_enough_twice_is_not_tried_again() -> None:
    assert [next_attempt_in(RunnerOutOfMemory(), attempt, 10, losses=attempt) for attempt in (1, 2)] == [0, None]


@pytest.mark.parametrize("kind", POLICIES)
def test_a_job_with_one_attempt_is_never_tried_again(kind: type[ReelrayError]) -> None:
    assert waits(kind(), 1) == [None]


@pytest.mark.parametrize("kind", [RunnerDisconnected, RunnerStalled, GenerationTimeout])
def test_a_callers_budget_takes_the_place_of_our_own_limits(kind: type[ReelrayError]) -> None:
    assert next_attempt_in(kind(), 1, 10, budget=0) is None
    assert next_attempt_in(kind(), 5, 10, losses=5, budget=1) == 8
    assert next_attempt_in(kind(), 10, 10, budget=5) is None, "no job is tried more often than the operator allows"


def test_waits_differ_by_a_quarter_either_way_and_never_overflow() -> None:
    assert [next_attempt_in(StorageFailed(), 2, 9, draw=draw) for draw in (0.0, 0.5, 1.0)] == [7.5, 10.0, 12.5]
    assert wait_s(POLICIES[StorageFailed], 100_000) == 300


def test_what_callers_are_told_is_retryable_is_what_is_retried() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ReelrayError)]
    assert {kind for kind in kinds if policy_of(kind())} == {kind for kind in kinds if kind.retryable}


async def claimed(store: JobStore) -> Claim:
    claim = await store.claims.take([ENDPOINT], 60)
    assert claim is not None
    return claim


async def read(store: JobStore, job_id: UUID) -> Job:
    job = await store.get(job_id)
    assert job is not None
    return job


async def test_job_that_has_to_wait_is_passed_by_and_then_goes_first(store: JobStore, sql: asyncpg.Connection) -> None:
    jobs = [await store.submit(NEW) for _ in range(3)]
    await store.claims.requeue(await claimed(store), "a full disk", counted=True, wait_s=60)
    assert [(await read(store, job.id)).position for job in jobs] == [0, 0, 1]
    assert (await claimed(store)).job_id == jobs[1].id
    await store.claims.sweep()
    assert (await read(store, jobs[0].id)).attempt == 1
    await sql.execute("UPDATE jobs SET not_before = now() WHERE not_before IS NOT NULL")
    async with store.claims.watch_work() as work:
        await store.claims.sweep()
        assert await work.changed(5)
    assert [(await claimed(store)).job_id for _ in range(2)] == [jobs[0].id, jobs[2].id]
    assert await store.claims.take([ENDPOINT], 60) is None


async def test_waiting_job_is_still_counted_cancelled_and_timed_out(store: JobStore, sql: asyncpg.Connection) -> None:
    jobs = [await store.submit(replace(NEW, start_timeout_s=600)) for _ in range(2)]
    for claim in [await claimed(store) for _ in jobs]:
        await store.claims.requeue(claim, "a full disk", counted=True, wait_s=60)
    assert await store.queued(ENDPOINT) == 2
    assert await store.request_cancel(jobs[0].id) is JobState.QUEUED
    await sql.execute("UPDATE jobs SET start_by = now()")
    await store.claims.sweep()
    assert [(await read(store, job.id)).state for job in jobs] == [JobState.CANCELLED, JobState.FAILED]


async def test_new_jobs_do_not_overtake_for_ever_one_that_waits_in_an_empty_queue(
    store: JobStore, sql: asyncpg.Connection
) -> None:
    for _ in range(5):
        await store.submit(NEW)
    claims = [await claimed(store) for _ in range(5)]
    await store.claims.requeue(claims[4], "a full disk", counted=True, wait_s=60)
    for claim in claims[:4]:
        await store.claims.succeed(claim, {}, {})
    newer = [await store.submit(NEW) for _ in range(5)]
    await sql.execute("UPDATE jobs SET not_before = now() WHERE not_before IS NOT NULL")
    await store.claims.sweep()
    assert (await claimed(store)).job_id == claims[4].job_id
    assert (await read(store, newer[0].id)).position == 0


async def test_lost_leases_have_a_budget_of_their_own(store: JobStore, sql: asyncpg.Connection) -> None:
    job = await store.submit(replace(NEW, retries={"connection_error": 1, "timeout": 3}))
    for left in (1, 0):
        assert (await claimed(store)).retries == {"connection_error": left, "timeout": 3}
        await sql.execute("UPDATE jobs SET lease_until = now() - interval '1 second'")
        await store.claims.sweep()
    assert (await read(store, job.id)).state is JobState.FAILED


async def test_lost_attempt_of_a_job_that_is_not_to_be_retried_is_its_end(store: JobStore, sql: asyncpg.Connection) -> None:
    job = await store.submit(replace(NEW, max_attempts=1))  # the effect of X-Fal-No-Retry
    await claimed(store)
    await sql.execute("UPDATE jobs SET lease_until = now()")
    await store.claims.sweep()
    assert (await read(store, job.id)).state is JobState.FAILED
