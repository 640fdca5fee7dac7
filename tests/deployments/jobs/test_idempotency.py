import asyncio
from dataclasses import replace

import asyncpg
import pytest

from deployments.jobs.job import Idempotency, JobState, NewJob
from deployments.jobs.store import JobStore
from deployments.schemas.failures import Failure
from engines.errors import IdempotencyKeyReused

ENDPOINT = "fal-ai/fake"
ONCE = NewJob(ENDPOINT, {"prompt": "a cat"}, idempotency=Idempotency("key", b"a cat"))
OTHER_BODY = replace(ONCE, input={"prompt": "a dog"}, idempotency=Idempotency("key", b"a dog"))
FAILURE = Failure(422, {"detail": []}, "no", "x", {})


async def test_repeat_is_answered_with_the_same_job(store: JobStore) -> None:
    job = await store.submit(ONCE)
    assert await store.submit(ONCE) == job
    assert await store.queued(ENDPOINT) == 1


async def test_simultaneous_repeats_make_one_job(database: str, store: JobStore) -> None:
    other = await JobStore.open(database)
    jobs = await asyncio.gather(*(through.submit(ONCE) for _ in range(20) for through in (store, other)))
    await other.close()
    assert len({job.id for job in jobs}) == 1
    assert await store.queued(ENDPOINT) == 1


async def test_repeat_finds_its_job_after_that_has_ended(store: JobStore) -> None:
    job = await store.submit(ONCE)
    claim = await store.claims.take([ENDPOINT], 60)
    assert claim is not None
    await store.claims.succeed(claim, {"seed": 7}, {})
    again = await store.submit(ONCE)
    assert (again.id, again.state, again.result) == (job.id, JobState.SUCCEEDED, {"seed": 7})


async def test_another_body_under_the_key_is_an_error_and_makes_no_job(store: JobStore) -> None:
    await store.submit(ONCE)
    with pytest.raises(IdempotencyKeyReused):
        await store.submit(OTHER_BODY)
    with pytest.raises(IdempotencyKeyReused):
        await store.submit_failed(OTHER_BODY, FAILURE)
    assert await store.queued(ENDPOINT) == 1


async def test_each_owner_has_keys_of_its_own(store: JobStore) -> None:
    jobs = [await store.submit(replace(ONCE, owner=owner)) for owner in (None, "one", "other")]
    assert len({job.id for job in jobs}) == 3
    assert (await store.submit(replace(ONCE, owner="one"))).id == jobs[1].id


async def test_key_is_free_again_when_its_time_is_over(store: JobStore, sql: asyncpg.Connection) -> None:
    first = await store.submit(ONCE)
    await sql.execute("UPDATE idempotency_keys SET expires_at = now()")
    second = await store.submit(OTHER_BODY)
    assert second.id != first.id
    assert (await store.submit(OTHER_BODY)).id == second.id


async def test_sweep_forgets_keys_whose_time_is_over(store: JobStore, sql: asyncpg.Connection) -> None:
    await store.submit(ONCE)
    kept = await store.submit(replace(ONCE, owner="other"))
    await sql.execute("UPDATE idempotency_keys SET expires_at = now() WHERE owner = ''")
    await store.claims.sweep()
    assert await sql.fetchval("SELECT array_agg(job_id) FROM idempotency_keys") == [kept.id]


async def test_input_that_was_refused_does_not_keep_the_key_from_the_mended_one(store: JobStore) -> None:
    refused = await store.submit_failed(ONCE, FAILURE)
    assert (await store.submit_failed(ONCE, FAILURE)).id == refused.id
    mended = await store.submit(OTHER_BODY)
    assert (mended.state, mended.id == refused.id) == (JobState.QUEUED, False)
    assert (await store.submit(OTHER_BODY)).id == mended.id


async def test_submit_under_a_key_that_lost_its_answer_returns_the_one_job(store: JobStore, lost: list[str]) -> None:
    job = await store.submit(ONCE)
    assert lost
    assert await store.queued(ENDPOINT) == 1
    assert (await store.submit(ONCE)).id == job.id
