import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from math import inf
from uuid import UUID

import asyncpg
import pytest

from deployments.jobs.job import Claim, Idempotency, NewJob
from deployments.jobs.retention import EXPIRY_BATCH, UNSTORED_S
from deployments.jobs.store import JobStore
from deployments.schemas.failures import error_failure
from engines.errors import GenerationFailed

ENDPOINT = "fal-ai/fake"
NEW = NewJob(ENDPOINT, {"prompt": "a secret"})
UNSTORED = replace(NEW, store_io=False)
DAY_S = 86_400.0
End = Callable[[JobStore, asyncpg.Connection, Claim], Awaitable[None]]


async def running(store: JobStore, new: NewJob = NEW) -> Claim:
    await store.submit(new)
    claim = await store.claims.take([ENDPOINT], 60)
    assert claim is not None
    return claim


async def done(store: JobStore, new: NewJob = NEW) -> UUID:
    claim = await running(store, new)
    await store.claims.log(claim, "step 1/4")
    await store.claims.succeed(claim, {"seed": 1}, {})
    return claim.job_id


async def age(sql: asyncpg.Connection, seconds: float) -> None:
    await sql.execute("UPDATE jobs SET finished_at = finished_at - make_interval(secs => $1)", seconds)


async def counts(sql: asyncpg.Connection) -> list[int]:
    tables = ("jobs", "job_events", "job_logs", "webhook_outbox", "idempotency_keys")
    return [await sql.fetchval(f"SELECT count(*) FROM {table}") for table in tables]


async def input_of(sql: asyncpg.Connection, job_id: UUID) -> str:
    text: str = await sql.fetchval("SELECT input::text FROM jobs WHERE id = $1", job_id)
    return text


# Jobs.


async def test_job_goes_with_all_that_belongs_to_it_when_its_time_is_over(store: JobStore, sql: asyncpg.Connection) -> None:
    await done(store, replace(NEW, webhook_url="https://h.example/", idempotency=Idempotency("key", b"")))
    await age(sql, 29 * DAY_S)
    assert await store.retention.expire_jobs(30 * DAY_S) == 0
    await age(sql, DAY_S)
    assert await store.retention.expire_jobs(30 * DAY_S) == 0, "its webhook is still to be delivered"
    await sql.execute("UPDATE webhook_outbox SET next_attempt_at = NULL")
    assert await store.retention.expire_jobs(30 * DAY_S) == 1
    assert await counts(sql) == [0] * 5


async def test_jobs_that_have_not_ended_and_those_kept_for_ever_stay(store: JobStore, sql: asyncpg.Connection) -> None:
    await done(store)
    await running(store)
    await store.submit(NEW)
    await sql.execute("UPDATE jobs SET created_at = created_at - interval '10 years'")
    await age(sql, 3650 * DAY_S)
    assert await store.retention.expire_jobs(None) == 0
    assert await store.retention.expire_jobs(30 * DAY_S) == 1


async def test_jobs_expire_in_batches_and_once_each_whoever_sweeps(
    database: str, store: JobStore, sql: asyncpg.Connection
) -> None:
    for _ in range(8):
        await done(store)
    await sql.execute("UPDATE jobs SET finished_at = finished_at - interval '1 year'")
    other = await JobStore.open(database)
    expired = await asyncio.gather(*(through.retention.expire_jobs(DAY_S) for _ in range(3) for through in (store, other)))
    await other.close()
    assert sum(expired) == 8
    assert EXPIRY_BATCH < 1000


# Payloads that are not to be stored.


async def test_input_that_is_not_to_be_stored_goes_with_the_jobs_end_and_not_before(
    store: JobStore, sql: asyncpg.Connection
) -> None:
    claim = await running(store, UNSTORED)
    await store.claims.requeue(claim, "the runner died", counted=True)
    again = await store.claims.take([ENDPOINT], 60)
    assert again is not None
    assert again.input == NEW.input
    await store.claims.succeed(again, {"seed": 1}, {})
    assert await input_of(sql, again.job_id) == "{}"
    job = await store.get(again.job_id)
    assert job is not None
    assert job.result == {"seed": 1}, "kept, as the caller has not fetched it yet"


async def test_input_goes_also_when_the_job_never_ran(store: JobStore, sql: asyncpg.Connection) -> None:
    job = await store.submit(UNSTORED)
    await store.request_cancel(job.id)
    assert await input_of(sql, job.id) == "{}"
    kept = await store.submit(NEW)
    await store.request_cancel(kept.id)
    assert "a secret" in await input_of(sql, kept.id)


async def test_job_that_is_not_to_be_stored_goes_when_its_result_could_be_fetched_and_its_webhook_told(
    store: JobStore, sql: asyncpg.Connection
) -> None:
    await done(store)
    plain = await done(store, UNSTORED)
    hooked = await done(store, replace(UNSTORED, webhook_url="https://h.example/"))
    assert await store.retention.expire_jobs(30 * DAY_S) == 0
    await age(sql, UNSTORED_S)
    assert await store.retention.expire_jobs(30 * DAY_S) == 1
    assert await store.get(plain) is None
    await sql.execute("UPDATE webhook_outbox SET next_attempt_at = NULL")
    assert await store.retention.expire_jobs(30 * DAY_S) == 1
    assert await store.get(hooked) is None
    assert (await counts(sql))[0] == 1


# Files.


async def test_files_are_deleted_when_their_time_is_over_and_not_before(store: JobStore, sql: asyncpg.Connection) -> None:
    deleted: list[str] = []

    async def delete(name: str) -> None:
        deleted.append(name)

    await store.retention.add_file("a/video.mp4", DAY_S)
    await store.retention.add_file("b/video.mp4", 2 * DAY_S)
    assert await store.retention.expire_files(delete) == 0
    await sql.execute("UPDATE stored_files SET expires_at = expires_at - interval '1 day'")
    assert await store.retention.expire_files(delete) == 1
    assert await store.retention.expire_files(delete) == 0
    assert deleted == ["a/video.mp4"]


async def test_file_whose_noting_was_answered_into_a_broken_connection_is_noted_again(
    store: JobStore, sql: asyncpg.Connection
) -> None:
    await store.retention.add_file("a/video.mp4", DAY_S)
    await store.retention.add_file("a/video.mp4", DAY_S)
    assert await sql.fetchval("SELECT count(*) FROM stored_files") == 1


async def test_file_that_cannot_be_deleted_is_tried_again_later_and_stops_no_other(
    store: JobStore, sql: asyncpg.Connection
) -> None:
    deleted: list[str] = []

    async def delete(name: str) -> None:
        if name == "a":
            raise PermissionError
        deleted.append(name)

    for name in ("a", "b"):
        await store.retention.add_file(name, DAY_S)
    await sql.execute("UPDATE stored_files SET expires_at = now()")
    assert await store.retention.expire_files(delete) == 2
    assert await store.retention.expire_files(delete) == 0
    assert deleted == ["b"]
    assert [row["name"] for row in await sql.fetch("SELECT name FROM stored_files WHERE expires_at > now()")] == ["a"]


async def test_concurrent_sweeps_delete_each_file_once(database: str, store: JobStore, sql: asyncpg.Connection) -> None:
    deleted: list[str] = []

    async def delete(name: str) -> None:
        await asyncio.sleep(0.001)
        deleted.append(name)

    for i in range(EXPIRY_BATCH + 20):
        await store.retention.add_file(f"{i:04}", DAY_S)
    await sql.execute("UPDATE stored_files SET expires_at = now()")
    other = await JobStore.open(database)
    while sum(await asyncio.gather(*(through.retention.expire_files(delete) for through in (store, other)))):
        pass
    await other.close()
    assert sorted(deleted) == [f"{i:04}" for i in range(EXPIRY_BATCH + 20)]


@pytest.mark.parametrize("end", ["cancel", "succeed", "fail"])
async def test_files_of_an_input_are_kept_until_its_job_ends(end: str, store: JobStore, sql: asyncpg.Connection) -> None:
    until = "SELECT (extract(epoch FROM expires_at) - extract(epoch FROM now()))::float FROM stored_files WHERE name = 'inputs/a'"
    await store.retention.add_file("inputs/a", DAY_S, "key", 7)
    job = await store.submit(NewJob(ENDPOINT, {}, owner="key", files=("inputs/a",)))
    assert await sql.fetchval(until) == inf
    if end == "cancel":
        await store.request_cancel(job.id)
    else:
        claim = await store.claims.take([ENDPOINT], 30.0)
        assert claim is not None
        failure = error_failure(GenerationFailed())
        await (store.claims.succeed(claim, {}, {}) if end == "succeed" else store.claims.fail(claim, failure, {}))
    assert 0 < await sql.fetchval(until) <= 600


# Checkpoints: files that are kept as long as their jobs.


async def left_s(sql: asyncpg.Connection, claim: Claim) -> float | None:
    """How long a checkpoint is still kept, in seconds; None if it is not recorded."""
    query = "SELECT (extract(epoch FROM expires_at) - extract(epoch FROM now()))::float FROM stored_files WHERE name = $1"
    seconds: float | None = await sql.fetchval(query, claim.checkpoint)
    return seconds


async def test_first_attempt_notes_a_checkpoint_and_later_ones_find_it(store: JobStore, sql: asyncpg.Connection) -> None:
    first = await running(store)
    assert first.checkpoint == f"checkpoints/{first.job_id}/latents.safetensors"
    assert not first.resumes
    assert await left_s(sql, first) == inf
    for counted in (True, False):
        claim = await store.claims.take([ENDPOINT], 60) or first
        await store.claims.requeue(claim, "the runner died", counted=counted)
        again = await store.claims.take([ENDPOINT], 60)
        assert again is not None
        assert (again.checkpoint, again.resumes) == (first.checkpoint, True)
        assert await left_s(sql, first) == inf
        await store.claims.requeue(again, "and again", counted=False)
    another = await running(store, replace(NEW, priority=-1))
    assert (another.checkpoint == first.checkpoint, another.resumes) == (False, False)


async def succeed(store: JobStore, sql: asyncpg.Connection, claim: Claim) -> None:
    await store.claims.succeed(claim, {}, {})


async def fail(store: JobStore, sql: asyncpg.Connection, claim: Claim) -> None:
    await store.claims.fail(claim, error_failure(GenerationFailed()), {})


async def cancel(store: JobStore, sql: asyncpg.Connection, claim: Claim) -> None:
    await store.request_cancel(claim.job_id)
    await store.claims.cancel(claim)


async def cancel_in_the_queue(store: JobStore, sql: asyncpg.Connection, claim: Claim) -> None:
    await store.claims.requeue(claim, "the runner died", counted=True)
    await store.request_cancel(claim.job_id)


async def lose_the_last_lease(store: JobStore, sql: asyncpg.Connection, claim: Claim) -> None:
    await sql.execute("UPDATE jobs SET lease_until = now() - interval '1 second', attempt = max_attempts")
    await store.claims.sweep()


async def miss_the_start(store: JobStore, sql: asyncpg.Connection, claim: Claim) -> None:
    await store.claims.requeue(claim, "the dispatcher shut down", counted=False)
    await sql.execute("UPDATE jobs SET start_by = now()")
    await store.claims.sweep()


async def overrun(store: JobStore, sql: asyncpg.Connection, claim: Claim) -> None:
    await sql.execute("UPDATE jobs SET lease_until = now() - interval '1 second', run_by = now()")
    await store.claims.sweep()


ENDS = [succeed, fail, cancel, cancel_in_the_queue, lose_the_last_lease, miss_the_start, overrun]


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
@pytest.mark.parametrize("new", [NEW, UNSTORED], ids=["stored", "unstored"])
async def test_checkpoint_goes_ten_minutes_after_its_job_has_ended_however(
    store: JobStore, sql: asyncpg.Connection, end: End, new: NewJob
) -> None:
    deleted: list[str] = []

    async def delete(name: str) -> None:
        deleted.append(name)

    claim = await running(store, new)
    await end(store, sql, claim)
    another = await running(store)
    job = await store.get(claim.job_id)
    assert job is not None
    assert job.state.ended
    left = await left_s(sql, claim)
    assert left is not None
    assert 590 < left <= 600
    assert await store.retention.expire_files(delete) == 0, "kept, as the worker may still write"
    await sql.execute("UPDATE stored_files SET expires_at = expires_at - interval '10 minutes'")
    assert await store.retention.expire_files(delete) == 1
    assert deleted == [claim.checkpoint]
    assert await left_s(sql, another) == inf
