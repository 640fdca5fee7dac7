import asyncio
from collections import Counter
from dataclasses import replace
from uuid import UUID, uuid4

import asyncpg
import pytest

from deployments.jobs.job import TRANSITIONS, Claim, Idempotency, Job, JobState, JobSummary, LeaseLost, NewJob
from deployments.jobs.store import JobStore
from deployments.schemas.failures import Failure, error_failure
from engines.errors import Cancelled, RunnerDisconnected, StartTimeout
from tests.patience import PATIENCE_S

ENDPOINT = "fal-ai/fake"
NEW = NewJob(ENDPOINT, {"prompt": "a cat"}, webhook_url="https://example.com/hook")
FAILURE = Failure(422, {"detail": [{"loc": ["body", "seed"], "msg": "no", "type": "x"}]}, "no", "x", {"X-Fal-Needs-Retry": "0"})
METRICS = {"inference_time": 1.5}


async def claimed(store: JobStore, lease_s: float = 60.0) -> Claim:
    claim = await store.claims.take([ENDPOINT], lease_s)
    assert claim is not None
    return claim


async def running(store: JobStore, new: NewJob = NEW) -> tuple[Job, Claim]:
    return await store.submit(new), await claimed(store)


async def expired(store: JobStore, new: NewJob = NEW) -> tuple[Job, Claim]:
    job, claim = await store.submit(new), await claimed(store, lease_s=0.001)
    await asyncio.sleep(0.005)
    return job, claim


async def read(store: JobStore, job_id: UUID) -> Job:
    job = await store.get(job_id)
    assert job is not None
    return job


async def events(sql: asyncpg.Connection, job_id: UUID) -> list[str]:
    return [row["state"] for row in await sql.fetch("SELECT state FROM job_events WHERE job_id = $1 ORDER BY id", job_id)]


async def webhooks(sql: asyncpg.Connection, job_id: UUID) -> list[str]:
    return [row["url"] for row in await sql.fetch("SELECT url FROM webhook_outbox WHERE job_id = $1", job_id)]


# Submissions.


async def test_submitted_job_is_queued_and_readable(store: JobStore) -> None:
    job = await store.submit(replace(NEW, owner="key"))
    assert (job.state, job.position, job.owner, job.endpoint) == (JobState.QUEUED, 0, "key", ENDPOINT)
    assert (job.started_at, job.finished_at, job.attempt, job.metrics) == (None, None, 0, {})
    assert job.created_at.utcoffset() is not None
    assert await store.get(job.id) == job


async def test_unknown_job_is_none(store: JobStore) -> None:
    assert await store.get(uuid4()) is None
    assert await store.request_cancel(uuid4()) is None
    assert await store.logs(uuid4()) == []


async def test_failed_submission_is_recorded_closed_and_told(store: JobStore, sql: asyncpg.Connection) -> None:
    job = await store.submit_failed(NEW, FAILURE)
    assert (job.state, job.failure, job.position) == (JobState.FAILED, FAILURE, None)
    assert job.finished_at is not None
    assert await webhooks(sql, job.id) == [NEW.webhook_url]
    assert await store.claims.take([ENDPOINT], 60) is None


async def test_nul_and_lone_surrogates_survive(store: JobStore) -> None:
    hostile = {"prompt": "a\x00b\ud800c\U0001f600", "\x00key\udfff": ["\x00"]}
    job = await store.submit(replace(NEW, input=hostile))
    claim = await claimed(store)
    assert claim.input == hostile
    await store.claims.log(claim, "a\x00b\ud800c")
    await store.claims.fail(claim, replace(FAILURE, body=hostile, error="\x00\ud800"), {})
    failed = await read(store, job.id)
    assert failed.failure is not None
    assert (failed.failure.body, failed.failure.error) == (hostile, "\x00\ud800")
    assert [line.message for line in await store.logs(job.id)] == ["a\N{REPLACEMENT CHARACTER}b?c"]


async def test_megabytes_of_input_come_back_whole(store: JobStore) -> None:
    new = replace(NEW, input={"image_url": "data:" + "A" * 8_000_000})
    await store.submit(new)
    assert (await claimed(store)).input == new.input


async def test_submit_that_lost_its_answer_returns_the_one_job(store: JobStore, lost: list[str]) -> None:
    job = await store.submit(replace(NEW, notes=("one", "two")))
    assert lost
    assert [(line.seq, line.level, line.message) for line in await store.logs(job.id)] == [(1, "WARN", "one"), (2, "WARN", "two")]
    assert await store.queued(ENDPOINT) == 1
    assert (await claimed(store)).job_id == job.id


# The order.


async def test_position_counts_the_jobs_ahead_at_the_same_endpoint(store: JobStore) -> None:
    await store.submit(replace(NEW, endpoint="fal-ai/other"))
    jobs = [await store.submit(NEW) for _ in range(4)]
    assert [job.position for job in jobs] == [0, 1, 2, 3]
    await claimed(store)
    await store.request_cancel(jobs[2].id)
    assert [(await read(store, job.id)).position for job in jobs] == [None, 0, None, 1]
    assert await store.queued(ENDPOINT) == 2
    assert await store.queued(ENDPOINT, at_most=1) == 1


async def test_low_priority_goes_behind_all_normal_ones(store: JobStore) -> None:
    low = await store.submit(replace(NEW, priority=10))
    normal = [await store.submit(NEW) for _ in range(2)]
    assert (await read(store, low.id)).position == 2
    assert [(await claimed(store)).job_id for _ in range(3)] == [normal[0].id, normal[1].id, low.id]


async def test_owners_take_turns(store: JobStore) -> None:
    heavy = [await store.submit(replace(NEW, owner="heavy")) for _ in range(4)]
    light = [await store.submit(replace(NEW, owner="light")) for _ in range(2)]
    expected = [heavy[0].id, light[0].id, heavy[1].id, light[1].id, heavy[2].id, heavy[3].id]
    positions = {job.id: (await read(store, job.id)).position for job in heavy + light}
    assert sorted(positions, key=lambda job_id: positions[job_id] or 0) == expected
    assert [(await claimed(store)).job_id for _ in range(6)] == expected


async def test_owner_who_comes_late_does_not_wait_for_the_whole_line(store: JobStore) -> None:
    for _ in range(20):
        await store.submit(replace(NEW, owner="heavy"))
    for _ in range(10):
        await claimed(store)
    assert (await store.submit(replace(NEW, owner="light"))).position == 1


async def test_claim_serves_only_the_endpoints_asked_for(store: JobStore) -> None:
    other = await store.submit(replace(NEW, endpoint="fal-ai/other"))
    job = await store.submit(NEW)
    assert await store.claims.take(["fal-ai/none"], 60) is None
    assert await store.claims.take([], 60) is None
    assert (await claimed(store)).job_id == job.id
    both = await store.claims.take([ENDPOINT, "fal-ai/other"], 60)
    assert both is not None
    assert both.job_id == other.id


async def test_deep_positions_are_known_to_two_hundred(store: JobStore, sql: asyncpg.Connection) -> None:
    await sql.execute(
        "INSERT INTO jobs (id, endpoint, priority, turn, state, input, max_attempts)"
        " SELECT gen_random_uuid(), $1, 0, n, 'queued', '{}', 1 FROM generate_series(1, 700) AS n",
        ENDPOINT,
    )
    job = await store.submit(NEW)
    assert job.position == 600
    assert await store.queued(ENDPOINT) == 701
    for depth, position in ((199, 199), (200, 200), (201, 200), (400, 400), (599, 400)):
        job_id = await sql.fetchval("SELECT id FROM jobs ORDER BY turn, number OFFSET $1 LIMIT 1", depth)
        assert (await read(store, job_id)).position == position


async def test_jobs_submitted_at_once_queue_up_in_their_owners_turn(store: JobStore) -> None:
    first = await store.submit(replace(NEW, owner="a"))
    jobs = await asyncio.gather(*(store.submit(replace(NEW, owner=owner)) for owner in "aaabbb"))
    assert len({job.id for job in jobs}) == 6
    order = [(await claimed(store)).job_id for _ in range(7)]
    owner_of = {job.id: job.owner for job in (first, *jobs)}
    assert [owner_of[job_id] for job_id in order] == list("abababa")


async def test_a_submission_that_cannot_be_written_fails_alone(store: JobStore) -> None:
    submissions = (store.submit(NEW), store.submit(replace(NEW, webhook_url="http://a/\0")), store.submit(NEW))
    good, bad, also_good = await asyncio.gather(*submissions, return_exceptions=True)
    assert isinstance(bad, asyncpg.PostgresError)
    assert isinstance(good, Job)
    assert isinstance(also_good, Job)
    assert await store.queued(ENDPOINT) == 2


async def test_submissions_under_one_key_at_once_make_one_job(store: JobStore) -> None:
    new = replace(NEW, idempotency=Idempotency("once", b"same"))
    jobs = await asyncio.gather(*(store.submit(new) for _ in range(20)))
    assert len({job.id for job in jobs}) == 1
    assert await store.queued(ENDPOINT) == 1


async def test_large_inputs_are_submitted_beside_small_ones(store: JobStore) -> None:
    large = {"prompt": "x" * 200_000}
    jobs = await asyncio.gather(*(store.submit(replace(NEW, input=each)) for each in (large, NEW.input, large)))
    inputs = [(await claimed(store)).input for _ in jobs]
    assert sorted(map(len, (str(each) for each in inputs)))[1:] == [len(str(large))] * 2


# Attempts.


async def test_claim_starts_a_numbered_attempt_with_its_own_token(store: JobStore) -> None:
    job, first = await running(store)
    assert (first.job_id, first.attempt, first.max_attempts, first.input) == (job.id, 1, 10, NEW.input)
    started = await read(store, job.id)
    assert (started.state, started.position, started.attempt) == (JobState.RUNNING, None, 1)
    await store.claims.requeue(first, "the runner died", counted=True)
    assert (await read(store, job.id)).started_at is None
    second = await claimed(store)
    assert (second.job_id, second.attempt) == (job.id, 2)
    assert second.token != first.token
    restarted = await read(store, job.id)
    assert started.started_at is not None
    assert restarted.started_at is not None
    assert restarted.started_at > started.started_at


async def test_success_closes_the_job_and_fills_the_outbox(store: JobStore, sql: asyncpg.Connection) -> None:
    job, claim = await running(store)
    await store.claims.succeed(claim, {"seed": 7}, METRICS)
    ended = await read(store, job.id)
    assert (ended.state, ended.result, ended.metrics, ended.failure) == (JobState.SUCCEEDED, {"seed": 7}, METRICS, None)
    assert ended.finished_at is not None
    assert await events(sql, job.id) == ["queued", "running", "succeeded"]
    assert await webhooks(sql, job.id) == [NEW.webhook_url]


async def test_failure_closes_the_job_with_what_the_caller_will_be_told(store: JobStore, sql: asyncpg.Connection) -> None:
    job, claim = await running(store, replace(NEW, webhook_url=None))
    await store.claims.fail(claim, FAILURE, METRICS)
    ended = await read(store, job.id)
    assert (ended.state, ended.result, ended.metrics, ended.failure) == (JobState.FAILED, None, METRICS, FAILURE)
    assert await webhooks(sql, job.id) == []


async def test_requeued_job_keeps_its_place(store: JobStore) -> None:
    jobs = [await store.submit(replace(NEW, owner=owner)) for owner in ("a", "a", "b")]
    claim = await claimed(store)
    await store.submit(replace(NEW, owner="c"))
    await store.claims.requeue(claim, "the runner died", counted=True)
    assert (await read(store, jobs[0].id)).position == 0


async def test_job_requeued_into_an_emptied_queue_goes_before_newer_ones(store: JobStore) -> None:
    jobs = [await store.submit(NEW) for _ in range(3)]
    claims = [await claimed(store) for _ in jobs]
    newer = await store.submit(NEW)
    await store.claims.requeue(claims[2], "the runner died", counted=True)
    assert [(await read(store, job.id)).position for job in (jobs[2], newer)] == [0, 1]


async def test_attempt_given_back_uncounted_never_fails_the_job(store: JobStore) -> None:
    job, claim = await running(store, replace(NEW, max_attempts=1))
    await store.claims.requeue(claim, "shutting down", counted=False)
    requeued = await read(store, job.id)
    assert (requeued.state, requeued.attempt) == (JobState.QUEUED, 0)


async def test_job_that_was_released_has_met_its_start_deadline(store: JobStore, sql: asyncpg.Connection) -> None:
    released, claim = await running(store, replace(NEW, start_timeout_s=60))
    await store.claims.requeue(claim, "shutting down", counted=False)
    failed = await store.submit(replace(NEW, start_timeout_s=60, endpoint="fal-ai/other"))
    other = await store.claims.take(["fal-ai/other"], 60)
    assert other is not None
    await store.claims.requeue(other, "the runner died", counted=True)
    await sql.execute("UPDATE jobs SET start_by = now() WHERE start_by IS NOT NULL")
    await store.claims.sweep()
    assert [(await read(store, job.id)).state for job in (released, failed)] == [JobState.QUEUED, JobState.FAILED]


async def test_last_counted_attempt_fails_the_job_as_disconnected(store: JobStore, sql: asyncpg.Connection) -> None:
    job, claim = await running(store, replace(NEW, max_attempts=2))
    await store.claims.requeue(claim, "the runner died", counted=True)
    await store.claims.requeue(await claimed(store), "the runner died", counted=True)
    failed = await read(store, job.id)
    assert (failed.state, failed.failure) == (JobState.FAILED, error_failure(RunnerDisconnected()))
    assert await webhooks(sql, job.id) == [NEW.webhook_url]


async def test_requeued_job_whose_cancel_was_requested_is_cancelled(store: JobStore) -> None:
    job, claim = await running(store)
    await store.request_cancel(job.id)
    await store.claims.requeue(claim, "the runner died", counted=True)
    assert (await read(store, job.id)).state == JobState.CANCELLED


async def test_concurrent_claimers_never_share_a_job(database: str, store: JobStore) -> None:
    submitted = [(await store.submit(NEW)).id for _ in range(200)]
    other = await JobStore.open(database)
    taken: Counter[UUID] = Counter()

    async def work(through: JobStore) -> None:
        while claim := await through.claims.take([ENDPOINT], 60):
            taken[claim.job_id] += 1
            await through.claims.succeed(claim, {}, {})

    await asyncio.gather(*(work(through) for through in (store, other) for _ in range(4)))
    await other.close()
    assert taken == Counter(submitted)


async def test_worker_whose_lease_expired_changes_nothing(store: JobStore) -> None:
    job, late = await expired(store)
    assert await store.claims.sweep() == 1
    writes = (
        lambda: store.claims.heartbeat(late, 60),
        lambda: store.claims.log(late, "late"),
        lambda: store.claims.succeed(late, {"late": True}, {}),
        lambda: store.claims.fail(late, FAILURE, {}),
        lambda: store.claims.cancel(late),
        lambda: store.claims.requeue(late, "late", counted=True),
    )
    for write in writes:  # before the next attempt
        with pytest.raises(LeaseLost):
            await write()
    current = await claimed(store)
    for write in writes:  # while it runs
        with pytest.raises(LeaseLost):
            await write()
    await store.claims.succeed(current, {"late": False}, {})
    before = await read(store, job.id)
    for write in writes:  # and after it
        with pytest.raises(LeaseLost):
            await write()
    assert await read(store, job.id) == before
    assert before.result == {"late": False}
    assert await store.logs(job.id) == []


async def test_outcome_may_be_reported_again_by_the_same_attempt_but_not_changed(store: JobStore) -> None:
    job, claim = await running(store)
    await store.claims.succeed(claim, {"seed": 7}, METRICS)
    await store.claims.succeed(claim, {"seed": 8}, {})
    with pytest.raises(LeaseLost):
        await store.claims.fail(claim, FAILURE, {})
    with pytest.raises(LeaseLost):
        await store.claims.requeue(claim, "confused", counted=True)
    ended = await read(store, job.id)
    assert (ended.result, ended.metrics) == ({"seed": 7}, METRICS)


async def test_heartbeat_keeps_the_job_from_the_sweep(store: JobStore) -> None:
    _, claim = await expired(store)
    assert await store.claims.heartbeat(claim, 60) is False
    assert await store.claims.sweep() == 0


async def test_log_lines_come_in_order_and_only_new_ones_when_asked(store: JobStore) -> None:
    job, claim = await running(store)
    await store.claims.log(claim, "one")
    await store.claims.log(claim, "two", "WARN")
    first, second = await store.logs(job.id)
    assert [(line.level, line.message) for line in (first, second)] == [("INFO", "one"), ("WARN", "two")]
    assert await store.logs(job.id, after=first.seq) == [second]
    assert await store.logs(job.id, after=second.seq) == []


async def test_lines_are_counted_within_their_job_over_all_its_attempts(store: JobStore) -> None:
    job, first = await running(store)
    await store.claims.log(first, "one")
    _, beside = await running(store)
    await store.claims.log(beside, "another job's")
    await store.claims.requeue(first, "the runner died", counted=True)
    again = await claimed(store)
    await store.claims.log(again, "two", progress={"stage": "denoise", "step": {"done": 1, "total": 4}, "eta_s": None})
    one, two = await store.logs(job.id)
    assert [(line.seq, line.message) for line in (one, two)] == [(1, "one"), (2, "two")]
    assert (one.progress, two.progress) == (None, {"stage": "denoise", "step": {"done": 1, "total": 4}, "eta_s": None})
    assert [line.seq for line in await store.logs(beside.job_id)] == [1]


async def test_line_whose_answer_was_lost_is_written_once(store: JobStore) -> None:
    job, claim = await running(store)
    line = uuid4()
    for _ in range(2):
        assert await store.claims.log(claim, "one", line_id=line) is True
    await store.claims.log(claim, "one")
    assert [(told.seq, told.message) for told in await store.logs(job.id)] == [(1, "one"), (2, "one")]


async def test_lines_written_at_once_have_numbers_of_their_own(store: JobStore) -> None:
    job, claim = await running(store)
    said = {f"line {k}" for k in range(50)}
    await asyncio.gather(*(store.claims.log(claim, message) for message in said))
    lines = await store.logs(job.id)
    assert [line.seq for line in lines] == list(range(1, 51))
    assert {line.message for line in lines} == said


async def test_a_log_that_is_full_says_so_once_and_takes_no_more(store: JobStore, sql: asyncpg.Connection) -> None:
    job, claim = await running(store)
    await sql.execute(
        "INSERT INTO job_logs (job_id, level, message) SELECT $1, 'INFO', 'line ' || k FROM generate_series(1, 1999) AS k", job.id
    )
    assert await store.claims.log(claim, "the last one") is True
    assert await store.claims.log(claim, "one too many", progress={"stage": "denoise"}) is True
    for _ in range(3):
        assert await store.claims.log(claim, "and more") is False
    lines = await store.logs(job.id)
    assert [line.seq for line in lines] == list(range(1, 2002))
    assert lines[-2].message == "the last one"
    assert (lines[-1].level, lines[-1].message, lines[-1].progress) == (
        "WARN",
        "this log is full: lines after its first 2000 are not kept",
        None,
    )
    await store.claims.requeue(claim, "the runner died", counted=True)
    assert await store.claims.log(await claimed(store), "of the next attempt") is False


async def test_a_long_line_is_cut(store: JobStore) -> None:
    job, claim = await running(store)
    await store.claims.log(claim, "x" * 2000)
    await store.claims.log(claim, "x" * 1_000_000)
    assert [line.message for line in await store.logs(job.id)] == ["x" * 2000, "x" * 1999 + "…"]


async def test_number_that_json_cannot_say_is_refused_before_it_is_written(store: JobStore) -> None:
    job, claim = await running(store)
    with pytest.raises(asyncpg.DataError):
        await store.claims.succeed(claim, {"loss": float("nan")}, {})
    assert (await read(store, job.id)).state == JobState.RUNNING


# Cancel.


async def test_cancel_of_a_queued_job_ends_it(store: JobStore, sql: asyncpg.Connection) -> None:
    job = await store.submit(NEW)
    assert await store.request_cancel(job.id) == JobState.QUEUED
    ended = await read(store, job.id)
    assert (ended.state, ended.failure) == (JobState.CANCELLED, error_failure(Cancelled()))
    assert await store.claims.take([ENDPOINT], 60) is None
    assert await webhooks(sql, job.id) == [NEW.webhook_url]


async def test_cancel_of_a_running_job_flags_it_and_tells_its_worker(store: JobStore) -> None:
    job, claim = await running(store)
    async with store.watch(job.id) as changes:
        assert await store.request_cancel(job.id) == JobState.RUNNING
        assert await changes.changed(PATIENCE_S)
    flagged = await read(store, job.id)
    assert (flagged.state, flagged.cancel_requested, flagged.failure) == (JobState.RUNNING, True, None)
    assert await store.claims.heartbeat(claim, 60) is True
    await store.claims.cancel(claim)
    ended = await read(store, job.id)
    assert (ended.state, ended.failure) == (JobState.CANCELLED, error_failure(Cancelled()))


@pytest.mark.parametrize("end", [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED])
async def test_cancel_of_an_ended_job_does_nothing(store: JobStore, end: JobState) -> None:
    job, claim = await running(store)
    ends = {
        JobState.SUCCEEDED: lambda: store.claims.succeed(claim, {}, {}),
        JobState.FAILED: lambda: store.claims.fail(claim, FAILURE, {}),
        JobState.CANCELLED: lambda: store.claims.cancel(claim),
    }
    await ends[end]()
    before = await read(store, job.id)
    assert await store.request_cancel(job.id) == end
    assert await read(store, job.id) == before


async def test_cancel_and_claim_at_once_have_one_of_two_outcomes(store: JobStore) -> None:
    for _ in range(40):
        job = await store.submit(NEW)
        found, claim = await asyncio.gather(store.request_cancel(job.id), store.claims.take([ENDPOINT], 60))
        after = await read(store, job.id)
        if claim is None:
            assert (found, after.state) == (JobState.QUEUED, JobState.CANCELLED)
        else:
            assert (found, after.state, after.cancel_requested) == (JobState.RUNNING, JobState.RUNNING, True)


# The sweep and the deadline.


async def test_sweep_returns_an_expired_job_to_its_place(store: JobStore, sql: asyncpg.Connection) -> None:
    job, _ = await expired(store)
    await store.submit(NEW)
    assert await store.claims.sweep() == 1
    assert await store.claims.sweep() == 0
    swept = await read(store, job.id)
    assert (swept.state, swept.attempt, swept.position) == (JobState.QUEUED, 1, 0)
    assert await sql.fetchval("SELECT reason FROM job_events ORDER BY id DESC LIMIT 1") == "lease expired"


async def test_sweep_fails_a_job_that_has_used_its_attempts(store: JobStore, sql: asyncpg.Connection) -> None:
    job, _ = await expired(store, replace(NEW, max_attempts=1))
    assert await store.claims.sweep() == 1
    swept = await read(store, job.id)
    assert (swept.state, swept.failure) == (JobState.FAILED, error_failure(RunnerDisconnected()))
    assert await webhooks(sql, job.id) == [NEW.webhook_url]


async def test_sweep_cancels_a_job_whose_worker_died_before_its_cancel(store: JobStore) -> None:
    job, _ = await expired(store, replace(NEW, max_attempts=1))
    await store.request_cancel(job.id)
    assert await store.claims.sweep() == 1
    swept = await read(store, job.id)
    assert (swept.state, swept.failure) == (JobState.CANCELLED, error_failure(Cancelled()))


async def test_job_past_its_start_deadline_is_not_claimed_and_fails(store: JobStore) -> None:
    late = await store.submit(replace(NEW, start_timeout_s=0.001))
    patient = await store.submit(replace(NEW, start_timeout_s=60))
    await asyncio.sleep(0.005)
    assert (await claimed(store)).job_id == patient.id
    assert await store.claims.sweep() == 1
    failed = await read(store, late.id)
    assert (failed.state, failed.failure) == (JobState.FAILED, error_failure(StartTimeout()))


async def test_start_deadline_does_not_bound_running_work(store: JobStore, sql: asyncpg.Connection) -> None:
    job, claim = await running(store, replace(NEW, start_timeout_s=60.0))
    await sql.execute("UPDATE jobs SET start_by = now() - interval '1 s'")
    assert await store.claims.sweep() == 0
    await store.claims.succeed(claim, {}, {})
    assert (await read(store, job.id)).state == JobState.SUCCEEDED


async def test_concurrent_sweeps_change_each_job_once(store: JobStore, sql: asyncpg.Connection) -> None:
    for _ in range(30):
        await expired(store)
    assert sum(await asyncio.gather(*(store.claims.sweep() for _ in range(6)))) == 30
    assert await sql.fetchval("SELECT count(*) FROM job_events WHERE reason = 'lease expired'") == 30


# Changes that the database itself refuses.


@pytest.mark.parametrize("old", JobState)
async def test_database_allows_exactly_the_transitions_drawn(store: JobStore, sql: asyncpg.Connection, old: JobState) -> None:
    await store.submit(NEW)
    open_ = "result = NULL, failure = NULL, finished_at = NULL"
    columns = {
        JobState.QUEUED: open_,
        JobState.RUNNING: f"{open_}, token = id, lease_until = now(), started_at = now()",
        JobState.SUCCEEDED: "result = '{}', failure = NULL, finished_at = now()",
        JobState.FAILED: "result = NULL, failure = '{}', finished_at = now()",
        JobState.CANCELLED: "result = NULL, failure = '{}', finished_at = now()",
    }
    await sql.execute("ALTER TABLE jobs DISABLE TRIGGER USER")
    await sql.execute(f"UPDATE jobs SET state = '{old}', {columns[old]}")
    await sql.execute("ALTER TABLE jobs ENABLE TRIGGER USER")
    for new in set(JobState) - {old}:
        attempt = sql.transaction()
        await attempt.start()
        if new in TRANSITIONS[old]:
            await sql.execute(f"UPDATE jobs SET state = '{new}', {columns[new]}")
        else:
            with pytest.raises(asyncpg.CheckViolationError, match="illegal transition"):
                await sql.execute(f"UPDATE jobs SET state = '{new}', {columns[new]}")
        await attempt.rollback()
    assert await sql.fetchval("SELECT state FROM jobs") == old


async def test_job_cannot_be_inserted_in_another_state(sql: asyncpg.Connection) -> None:
    with pytest.raises(asyncpg.CheckViolationError, match="illegal transition"):
        await sql.execute(
            "INSERT INTO jobs (id, endpoint, priority, turn, state, input, max_attempts, result, finished_at)"
            " VALUES (gen_random_uuid(), 'e', 0, 0, 'succeeded', '{}', 1, '{}', now())"
        )


async def test_state_change_and_its_webhook_stand_or_fall_together(store: JobStore, sql: asyncpg.Connection) -> None:
    job, claim = await running(store)
    await sql.execute("DROP TABLE webhook_outbox")
    with pytest.raises(asyncpg.UndefinedTableError):
        await store.claims.succeed(claim, {}, {})
    assert (await read(store, job.id)).state == JobState.RUNNING
    assert await events(sql, job.id) == ["queued", "running"]


# Waiting.


async def test_watch_wakes_on_every_change_and_where_asked_to_on_lines(store: JobStore) -> None:
    job, claim = await running(store)
    other, last = await store.submit(NEW), await store.submit(NEW)
    async with store.watch(job.id) as changes, store.watch_lines(job.id) as lines_too, store.watch(last.id) as heard:
        await store.request_cancel(last.id)
        assert await heard.changed(PATIENCE_S)  # and so has been all that was before it
        for each in (changes, lines_too):
            await each.changed(0.05)
        await store.claims.log(claim, "line")
        assert await lines_too.changed(PATIENCE_S)
        assert not await changes.changed(0.05)
        await store.claims.succeed(claim, {}, {})
        assert await changes.changed(PATIENCE_S)
        assert await lines_too.changed(PATIENCE_S)
        await store.request_cancel(other.id)
        assert not await changes.changed(0.05)
        assert not await lines_too.changed(0.05)


async def test_watch_hears_what_happened_between_two_waits(store: JobStore) -> None:
    job, claim = await running(store)
    async with store.watch_lines(job.id) as first, store.watch_lines(job.id) as second:
        await store.claims.log(claim, "one")
        assert await first.changed(PATIENCE_S)
        assert await second.changed(PATIENCE_S)


async def test_work_is_announced_to_everybody_on_submit_and_on_requeue(store: JobStore) -> None:
    async with store.claims.watch_work() as one, store.claims.watch_work() as other:
        await store.submit(NEW)
        assert await one.changed(PATIENCE_S)
        assert await other.changed(PATIENCE_S)
        claim = await claimed(store)
        await store.claims.requeue(claim, "the runner died", counted=True)
        assert await one.changed(PATIENCE_S)


async def test_waiting_for_work_ends_by_itself(store: JobStore) -> None:
    async with asyncio.timeout(PATIENCE_S), store.claims.watch_work() as work:
        assert not await work.changed(0.01)


async def test_broken_connections_are_replaced(store: JobStore, sql: asyncpg.Connection) -> None:
    job, claim = await running(store)
    async with store.watch_lines(job.id) as changes:
        others = "datname = current_database() AND pid <> pg_backend_pid()"
        await sql.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")
        await store.claims.log(claim, "said while nobody listened")
        assert await changes.changed(PATIENCE_S)
        while await changes.changed(0.1):
            pass
        await store.claims.log(claim, "said to the new connection")
        assert await changes.changed(PATIENCE_S)
    assert len(await store.logs(job.id)) == 2


# What the operator sees.


async def test_a_timeline_tells_every_state_with_its_attempt_and_reason(store: JobStore) -> None:
    job, claim = await running(store)
    await store.claims.requeue(claim, "the runner died", counted=True)
    again = await claimed(store)
    await store.claims.succeed(again, {"seed": 7}, METRICS)
    timeline = await store.timeline(job.id)
    assert [(event.state, event.attempt, event.reason) for event in timeline] == [
        (JobState.QUEUED, 0, None),
        (JobState.RUNNING, 1, None),
        (JobState.QUEUED, 1, "the runner died"),
        (JobState.RUNNING, 2, None),
        (JobState.SUCCEEDED, 2, None),
    ]
    assert [event.at for event in timeline] == sorted(event.at for event in timeline)
    assert await store.timeline(uuid4()) == []


async def test_recent_jobs_are_the_newest_of_those_asked_for(store: JobStore) -> None:
    first, claim = await running(store)
    await store.claims.cancel(claim)
    await asyncio.sleep(0.002)  # ids of one millisecond have no order
    second = await store.submit(replace(NEW, endpoint="fal-ai/other", max_attempts=3))
    await asyncio.sleep(0.002)
    third = await store.submit(NEW)
    assert [job.id for job in await store.recent(10)] == [third.id, second.id, first.id]
    assert [job.id for job in await store.recent(2)] == [third.id, second.id]
    assert [job.id for job in await store.recent(1, ENDPOINT, JobState.CANCELLED)] == [first.id]
    assert await store.recent(10, "fal-ai/other", JobState.CANCELLED) == []
    [other] = await store.recent(10, "fal-ai/other")
    assert other == JobSummary(second.id, "fal-ai/other", JobState.QUEUED, second.created_at, 0, 3)
