"""Which job is claimed next: ageing and keys' limits. `test_store.py` tests the plain order."""

import asyncio
from collections import Counter
from dataclasses import replace
from uuid import UUID, uuid4

import asyncpg
import pytest

from deployments.jobs.claims import LOW_SHARE
from deployments.jobs.database import QUERIES
from deployments.jobs.job import Claim, Job, NewJob
from deployments.jobs.store import JobStore, _submission
from tests.deployments.jobs.conftest import lose_first_answer
from tests.patience import PATIENCE_S

ENDPOINT = "fal-ai/fake"
NEW = NewJob(ENDPOINT, {})
LOW = replace(NEW, priority=1)


async def claimed(store: JobStore) -> Claim:
    claim = await store.claims.take([ENDPOINT], 60)
    assert claim is not None
    return claim


async def claimed_ids(store: JobStore, count: int) -> list[UUID]:
    return [(await claimed(store)).job_id for _ in range(count)]


async def submitted(store: JobStore, new: NewJob, count: int) -> list[UUID]:
    return [(await store.submit(new)).id for _ in range(count)]


async def age(sql: asyncpg.Connection, hours: int = 1) -> None:
    await sql.execute("UPDATE jobs SET created_at = created_at - make_interval(hours => $1)", hours)


async def limited(store: JobStore, max_running: int | None) -> str:
    secret = await store.keys.create("limited", max_running)
    return secret.partition(":")[0]


# Priorities.


async def test_low_job_that_has_not_waited_long_goes_behind_every_normal_one(store: JobStore) -> None:
    low = await submitted(store, LOW, 2)
    normal = await submitted(store, NEW, 2 * LOW_SHARE)
    assert await claimed_ids(store, len(normal) + 2) == normal + low


async def test_low_jobs_that_have_waited_long_get_their_share_and_no_more(store: JobStore, sql: asyncpg.Connection) -> None:
    low = await submitted(store, LOW, 20)
    await age(sql)
    normal = await submitted(store, NEW, 20)
    order = await claimed_ids(store, 20)
    assert [job for job in order if job in low] == low[: 20 // LOW_SHARE]
    assert [job for job in order if job in normal] == normal[: 20 - 20 // LOW_SHARE]
    assert order.index(low[0]) == LOW_SHARE - 1


async def test_aged_low_job_is_not_held_up_by_anothers_limit(store: JobStore, sql: asyncpg.Connection) -> None:
    owner = await limited(store, 1)
    await store.submit(replace(NEW, owner=owner))
    await claimed(store)
    await store.submit(replace(LOW, owner=owner))
    (low,) = await submitted(store, LOW, 1)
    await age(sql)
    await submitted(store, NEW, LOW_SHARE)
    assert low in await claimed_ids(store, LOW_SHARE)


# Keys with a limit on running jobs.


async def test_jobs_over_their_keys_limit_wait_and_block_nobody(store: JobStore) -> None:
    owner = await limited(store, 2)
    limited_jobs = await submitted(store, replace(NEW, owner=owner), 5)
    others = await submitted(store, replace(NEW, owner="other"), 2)
    open_jobs = await submitted(store, NEW, 2)
    claims = [await claimed(store) for _ in range(6)]
    assert await store.claims.take([ENDPOINT], 60) is None
    started = {claim.job_id for claim in claims}
    assert started == {*limited_jobs[:2], *others, *open_jobs}
    ended = next(claim for claim in claims if claim.job_id == limited_jobs[0])
    async with store.claims.watch_work() as work:
        await store.claims.succeed(ended, {}, {})
        assert await work.changed(5), "those waiting for work are notified"
    assert await claimed_ids(store, 1) == [limited_jobs[2]]
    assert await store.claims.take([ENDPOINT], 60) is None


async def test_limit_counts_the_jobs_of_all_endpoints(store: JobStore) -> None:
    owner = await limited(store, 1)
    await store.submit(replace(NEW, owner=owner, endpoint="fal-ai/other"))
    await store.submit(replace(NEW, owner=owner))
    assert await store.claims.take(["fal-ai/other"], 60)
    assert await store.claims.take([ENDPOINT, "fal-ai/other"], 60) is None


async def test_requeued_cancelled_and_swept_jobs_give_their_room_back(store: JobStore, sql: asyncpg.Connection) -> None:
    owner = await limited(store, 1)
    await submitted(store, replace(NEW, owner=owner), 4)
    await store.claims.requeue(await claimed(store), "the runner died", counted=True)
    claim = await claimed(store)
    await store.request_cancel(claim.job_id)
    await store.claims.cancel(claim)
    await claimed(store)
    assert await store.claims.take([ENDPOINT], 60) is None
    await sql.execute("UPDATE jobs SET lease_until = now()")
    await store.claims.sweep()
    await claimed(store)


async def test_job_that_came_back_goes_before_its_owners_newer_one_also_beside_a_full_key(store: JobStore) -> None:
    full = await limited(store, 1)
    await store.submit(replace(NEW, owner=full))
    await claimed(store)
    await store.submit(replace(NEW, owner=full))
    older = await store.submit(replace(NEW, owner="other"))
    claim = await claimed(store)
    newer = await store.submit(replace(NEW, owner="other"))
    await store.claims.requeue(claim, "the runner died", counted=True)
    assert await claimed_ids(store, 2) == [older.id, newer.id]


async def test_overdue_job_lends_its_place_to_nobody_also_beside_a_full_key(store: JobStore, sql: asyncpg.Connection) -> None:
    full = await limited(store, 1)
    await store.submit(replace(NEW, owner=full))
    await claimed(store)
    await store.submit(replace(NEW, owner=full))
    await store.submit(replace(NEW, owner="late", start_timeout_s=60))
    late = await submitted(store, replace(NEW, owner="late"), 1)
    punctual = await submitted(store, replace(NEW, owner="punctual"), 1)
    await sql.execute("UPDATE jobs SET start_by = now() WHERE start_by IS NOT NULL")
    assert await claimed_ids(store, 2) == punctual + late


async def test_concurrent_claimers_never_exceed_a_limit_and_leave_nothing_behind(database: str, store: JobStore) -> None:
    owners = [await limited(store, most) for most in (1, 2, 3)]
    jobs = [job for owner in owners for job in await submitted(store, replace(NEW, owner=owner), 25)]
    most = dict(zip(owners, (1, 2, 3), strict=True))
    other = await JobStore.open(database)
    running: Counter[str | None] = Counter()
    done: list[UUID] = []

    async def work(through: JobStore) -> None:
        while len(done) < len(jobs):
            if (claim := await through.claims.take([ENDPOINT], 60)) is None:
                await asyncio.sleep(0.01)
                continue
            job = await through.get(claim.job_id)
            assert job is not None
            running[job.owner] += 1
            assert running[job.owner] <= most[job.owner or ""]
            await asyncio.sleep(0.001)
            running[job.owner] -= 1
            done.append(claim.job_id)
            await through.claims.succeed(claim, {}, {})

    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*(work(through) for through in (store, other) for _ in range(5)))
    await other.close()
    assert sorted(done) == sorted(jobs)


async def test_claim_reads_as_little_of_a_long_line_as_of_a_short_one(store: JobStore, sql: asyncpg.Connection) -> None:
    """20,000 jobs of a key at its limit are queued before one that may run."""
    owner = await limited(store, 1)
    await store.submit(replace(NEW, owner=owner))
    await claimed(store)
    await sql.execute(
        "INSERT INTO jobs (id, endpoint, owner, priority, turn, state, input, max_attempts)"
        " SELECT gen_random_uuid(), $1, $2, 0, 0, 'queued', '{}', 1 FROM generate_series(1, 20000)",
        ENDPOINT,
        owner,
    )
    await sql.execute("ANALYZE jobs")
    free: Job = await store.submit(replace(NEW, owner="free"))
    transaction = sql.transaction()
    await transaction.start()
    before = await sql.fetchval("SELECT idx_tup_fetch + seq_tup_read FROM pg_stat_xact_user_tables WHERE relname = 'jobs'")
    claim = await sql.fetchrow("SELECT id FROM claim_job($1, gen_random_uuid(), 60, NULL, false, 600)", [ENDPOINT])
    after = await sql.fetchval("SELECT idx_tup_fetch + seq_tup_read FROM pg_stat_xact_user_tables WHERE relname = 'jobs'")
    await transaction.rollback()
    assert claim["id"] == free.id
    assert after - before < 100


async def test_submission_reads_as_little_beside_many_delayed_jobs(store: JobStore, sql: asyncpg.Connection) -> None:
    await sql.execute(
        "INSERT INTO jobs (id, endpoint, owner, priority, turn, state, input, max_attempts, not_before)"
        " SELECT gen_random_uuid(), $1, 'key ' || n, 0, n, 'queued', '{}', 9, 'infinity' FROM generate_series(1, 20000) AS n",
        ENDPOINT,
    )
    await sql.execute("ANALYZE jobs")
    read = "SELECT idx_tup_fetch + seq_tup_read FROM pg_stat_xact_user_tables WHERE relname = 'jobs'"
    transaction = sql.transaction()
    await transaction.start()
    before = await sql.fetchval(read)
    await sql.fetch(QUERIES["submit"], *_submission(uuid4(), replace(NEW, owner="me")))
    after = await sql.fetchval(read)
    await transaction.rollback()
    assert after - before < 100


# A claim that is cut off.


async def test_claim_that_is_cancelled_after_its_commit_burns_no_attempt(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await store.submit(NEW)
    fetch, committed = asyncpg.Connection.fetch, asyncio.Event()

    async def slow(self: asyncpg.Connection, query: str, *args: object) -> object:
        rows = await fetch(self, query, *args)
        if "claim_job" in query:
            committed.set()
            await asyncio.Event().wait()
        return rows

    monkeypatch.setattr(asyncpg.Connection, "fetch", slow)
    claiming = asyncio.create_task(store.claims.take([ENDPOINT], 60))
    await committed.wait()
    claiming.cancel()
    await asyncio.wait([claiming])
    monkeypatch.undo()
    claim = await claimed(store)
    assert (claim.job_id, claim.attempt) == (job.id, 1)


async def test_claim_whose_answer_was_lost_gets_the_same_job_when_it_is_repeated(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = await submitted(store, NEW, 2)
    lost = lose_first_answer(monkeypatch, "fetch", "claim_job")
    claim = await claimed(store)
    assert lost
    assert (claim.job_id, claim.attempt) == (first, 1)


# Paused endpoints.


async def test_paused_endpoint_accepts_and_starts_nothing_until_it_is_resumed(store: JobStore) -> None:
    running = await store.submit(NEW)
    claim = await claimed(store)
    await store.pause(ENDPOINT)
    await store.pause(ENDPOINT)
    (job,) = await submitted(store, NEW, 1)
    other = await store.submit(replace(NEW, endpoint="fal-ai/other"))
    assert await store.claims.take([ENDPOINT], 60) is None
    open_claim = await store.claims.take([ENDPOINT, "fal-ai/other"], 60)
    assert open_claim is not None
    assert open_claim.job_id == other.id
    status = await store.queue_status(ENDPOINT)
    assert (status.queued, status.running, status.paused_at is None) == (1, 1, False)
    await store.claims.succeed(claim, {}, {})
    async with store.claims.watch_work() as work:
        await store.resume(ENDPOINT)
        assert await work.changed(5), "every dispatcher is notified at once"
    assert await claimed_ids(store, 1) == [job]
    await store.resume(ENDPOINT)
    assert (await store.queue_status(ENDPOINT)).paused_at is None
    assert running.id == claim.job_id


async def test_pause_is_seen_by_every_dispatcher_with_its_next_claim(database: str, store: JobStore) -> None:
    other = await JobStore.open(database)
    await submitted(store, NEW, 2)
    assert await other.claims.take([ENDPOINT], 60)
    await store.pause(ENDPOINT)
    assert await other.claims.take([ENDPOINT], 60) is None
    await other.close()


async def test_limit_is_shown_with_its_key(store: JobStore) -> None:
    await limited(store, 3)
    await limited(store, None)
    assert [key.max_running for key in await store.keys.list_all()] == [3, None]
