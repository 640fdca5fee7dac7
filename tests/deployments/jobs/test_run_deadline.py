from uuid import UUID

import asyncpg

from deployments.jobs.job import JobState, NewJob
from deployments.jobs.store import JobStore
from deployments.schemas.failures import error_failure
from engines.errors import GenerationTimeout

ENDPOINT = "fal-ai/fake"
NEW = NewJob(ENDPOINT, {})


async def running(store: JobStore, run_s: float | None) -> UUID:
    job = await store.submit(NEW)
    assert await store.claims.take([ENDPOINT], 60, run_s)
    return job.id


async def state(store: JobStore, job_id: UUID) -> JobState:
    job = await store.get(job_id)
    assert job is not None
    return job.state


async def test_job_that_outlived_its_dispatcher_and_its_deadline_fails(store: JobStore, sql: asyncpg.Connection) -> None:
    job_id = await running(store, run_s=60)
    await sql.execute("UPDATE jobs SET lease_until = now(), run_by = now()")
    assert await store.claims.sweep() == 1
    job = await store.get(job_id)
    assert job is not None
    assert (job.state, job.failure) == (JobState.FAILED, error_failure(GenerationTimeout()))
    assert await sql.fetchval("SELECT reason FROM job_events ORDER BY id DESC LIMIT 1") == "run deadline passed"


async def test_job_that_outlived_only_its_dispatcher_is_tried_again(store: JobStore, sql: asyncpg.Connection) -> None:
    jobs = [await running(store, run_s) for run_s in (60, None)]
    await sql.execute("UPDATE jobs SET lease_until = now()")
    assert await store.claims.sweep() == 2
    assert [await state(store, job_id) for job_id in jobs] == [JobState.QUEUED] * 2


async def test_deadline_begins_anew_with_every_attempt(store: JobStore, sql: asyncpg.Connection) -> None:
    job_id = await running(store, run_s=60)
    await sql.execute("UPDATE jobs SET lease_until = now()")
    await store.claims.sweep()
    await sql.execute("UPDATE jobs SET run_by = now()")
    assert await store.claims.take([ENDPOINT], 60, 60)
    await sql.execute("UPDATE jobs SET lease_until = now()")
    await store.claims.sweep()
    assert await state(store, job_id) is JobState.QUEUED


async def test_job_past_its_deadline_whose_cancel_was_requested_is_cancelled(store: JobStore, sql: asyncpg.Connection) -> None:
    job_id = await running(store, run_s=60)
    await store.request_cancel(job_id)
    await sql.execute("UPDATE jobs SET lease_until = now(), run_by = now()")
    await store.claims.sweep()
    assert await state(store, job_id) is JobState.CANCELLED
