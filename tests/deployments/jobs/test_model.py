"""The job store against `model.py`: Hypothesis makes random sequences of calls, on a real database whose clock the test moves.

The clock: the test's database has its own functions `now()` and `clock_timestamp()` in the schema `public`, which read one row,
and its sessions search `public` before `pg_catalog`. They exist before the migrations run, so that column defaults and triggers,
whose names are resolved when they are created, use them too. Unlike shifting the times in rows, this cannot miss a column, tests
deadlines to the second, and lets the model know every timestamp. Two differences remain. Within a transaction every statement
reads the fake time, while the real `now()` is the transaction's start; the clock never moves inside a call, so they agree. And
the real clock moves, while this one stands still between rules. The store is unchanged except for its URL. Its clocks in Python
(`QueuePositions`, the cache of keys, how long a call waits out an outage) play no part here.

In CI the sequences are always the same. `REELRAY_MODEL_EXAMPLES=1000 pytest --timeout=0 tests/deployments/jobs/test_model.py`
tries that many new ones.
"""

import asyncio
import json
import os
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from deployments.jobs.database import SQL, migrate
from deployments.jobs.job import TRANSITIONS, Claim, Idempotency, JobState, LeaseLost, NewJob
from deployments.jobs.store import JobStore
from deployments.schemas.failures import Failure
from engines.errors import IdempotencyKeyReused
from tests.conftest import execute, of_database
from tests.deployments.jobs.model import Model, ModelJob

EXAMPLES = os.environ.get("REELRAY_MODEL_EXAMPLES")
BEGAN = datetime(2030, 1, 1, tzinfo=UTC)
ENDPOINTS = ["fal-ai/fake", "fal-ai/other"]
SERVED = [[ENDPOINTS[0]], [ENDPOINTS[1]], ENDPOINTS]
PROCESSES = 2
KEEP_JOBS_S = 60
FAILURE = Failure(422, {"detail": "no"}, "no", "bad_input", {})
CLOCK = f"""
CREATE TABLE clock AS SELECT '{BEGAN.isoformat()}'::timestamptz AS at;
CREATE FUNCTION public.now() RETURNS timestamptz LANGUAGE sql STABLE AS 'SELECT at FROM clock';
CREATE FUNCTION public.clock_timestamp() RETURNS timestamptz LANGUAGE sql STABLE AS 'SELECT at FROM clock';
"""
SNAPSHOT = """
SELECT id, state, attempt, cancel_requested, token, lease_until, run_by, not_before, created_at, started_at, finished_at,
    failure ->> 'error_type' AS error_type,
    CASE WHEN state = 'queued' THEN (SELECT ahead FROM jobs_ahead(endpoint, priority, turn, number)) END AS position,
    (SELECT json_agg(json_build_array(state, attempt, reason) ORDER BY id) FROM job_events WHERE job_id = jobs.id) AS events,
    (SELECT array_agg(message ORDER BY seq) FROM job_logs WHERE job_id = jobs.id) AS logs,
    (SELECT array_agg(url) FROM webhook_outbox WHERE job_id = jobs.id) AS webhooks,
    (SELECT expires_at::text FROM stored_files WHERE name = checkpoint_name(jobs.id)) AS checkpoint_until,
    (finished_at + interval '10 minutes')::text AS soon_after
FROM jobs
"""
EXACT = ("state", "attempt", "cancel_requested", "error_type")
TIMES = ("created_at", "started_at", "finished_at")
OVER_LIMIT = """
SELECT owner, count(*) FROM jobs JOIN api_keys ON api_keys.id = jobs.owner
WHERE state = 'running' GROUP BY owner, max_running HAVING count(*) > max_running
"""

seconds = st.sampled_from([10, 20, 30, 60])
"""A few round numbers, so that a deadline often falls exactly on the moment at which it is checked."""
number = st.integers(0, 59)
"""An index, taken modulo the number of items, so that what Hypothesis draws does not depend on the database's answers."""


@dataclass(frozen=True)
class Wish:
    """A submission, drawn before the keys exist. owner: an index into the owners."""

    endpoint: str
    owner: int
    priority: int
    start_timeout_s: int | None
    max_attempts: int
    webhook: bool
    idempotency: Idempotency | None
    rejected: bool


report = st.tuples(
    st.sampled_from(["heartbeat", "log", "succeed", "fail", "cancel", "requeue", "requeue", "release", "crash"]),
    number,
    st.sampled_from([False, False, True]),
    st.just(0) | seconds,
)
"""A worker's report: its kind, which claim, whether it may come too late, and the job's wait before its next attempt."""
wish = st.builds(
    Wish,
    endpoint=st.sampled_from([ENDPOINTS[0], ENDPOINTS[0], ENDPOINTS[1]]),
    owner=st.integers(0, 3),
    priority=st.sampled_from([0, 0, 1]),
    start_timeout_s=st.none() | st.none() | seconds,
    max_attempts=st.integers(1, 3),
    webhook=st.booleans(),
    idempotency=st.none() | st.none() | st.builds(Idempotency, st.sampled_from("ab"), st.sampled_from([b"1", b"2"]), seconds),
    rejected=st.sampled_from([False, False, False, True]),
)


def at(second: int | None) -> datetime | None:
    return None if second is None else BEGAN + timedelta(seconds=second)


class StoreMachine(RuleBasedStateMachine):
    """The stores of several processes on one database, with their workers, callers and an operator.

    There are few rules, and each does several things: Hypothesis leaves out some rules in most sequences, and without
    submissions little happens.
    """

    url: str

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.claims: list[Claim] = []
        self.claimed: list[Counter[tuple[str, ...]]] = [Counter() for _ in range(PROCESSES)]

    @initialize(wishes=st.lists(wish, min_size=3, max_size=8))
    def begin(self, wishes: list[Wish]) -> None:
        self.sql: asyncpg.Connection = self.run(asyncpg.connect(self.url))
        self.run(
            self.sql.execute("DELETE FROM jobs; DELETE FROM paused_endpoints; DELETE FROM api_key_secrets; DELETE FROM api_keys")
        )
        self.run(self.sql.execute("UPDATE clock SET at = $1", BEGAN))
        self.stores = [self.run(JobStore.open(self.url, max_connections=3)) for _ in range(PROCESSES)]
        limits = {self.run(self.stores[0].keys.create("limited", most)).partition(":")[0]: most for most in (1, 2)}
        self.owners = [None, "free", *limits]
        self.model = Model(limits)
        self.call(0, wishes, None)

    def teardown(self) -> None:
        for store in getattr(self, "stores", ()):
            self.run(store.close())
        if hasattr(self, "sql"):
            self.run(self.sql.close())
        self.runner.close()

    def run(self, work: Awaitable[Any]) -> Any:
        async def done() -> Any:
            return await work

        return self.runner.run(done())

    def store(self, which: int) -> JobStore:
        return self.stores[which % PROCESSES]

    def any_job(self, which: int) -> ModelJob:
        return list(self.model.jobs.values())[which % len(self.model.jobs)]

    def any_claim(self, which: int, late: bool) -> Claim:
        """A claim that a worker made earlier. late: it may be one that the worker no longer holds."""
        running = [claim for claim in self.claims if self.is_running(claim)]
        among = self.claims if late or not running else running
        return among[which % len(among)]

    def is_running(self, claim: Claim) -> bool:
        job = self.model.jobs.get(claim.job_id)
        return job is not None and job.state is JobState.RUNNING and job.token == claim.token

    def agree(self, said: Callable[[], object], done: Awaitable[object]) -> None:
        """Asserts that the store gives the model's answer, or raises the same error."""
        expected: object
        answer: object
        try:
            expected = said()
        except (LeaseLost, IdempotencyKeyReused) as exc:
            expected = type(exc)
        try:
            answer = self.run(done)
        except (LeaseLost, IdempotencyKeyReused) as exc:
            answer = type(exc)
        assert answer == expected

    # Callers.

    @rule(which=number, wishes=st.lists(wish, max_size=3), cancelled=st.none() | number)
    def call(self, which: int, wishes: list[Wish], cancelled: int | None) -> None:
        store = self.store(which)
        for wish in wishes:
            self.submit(store, wish)
        if cancelled is not None and self.model.jobs:
            job_id = self.any_job(cancelled).id
            self.agree(lambda: self.model.request_cancel(job_id), store.request_cancel(job_id))
        if self.model.jobs:
            self.read(store, self.any_job(which))

    def submit(self, store: JobStore, wish: Wish) -> None:
        new = NewJob(
            wish.endpoint,
            {"prompt": "a cat"},
            owner=self.owners[wish.owner],
            priority=wish.priority,
            start_timeout_s=wish.start_timeout_s,
            max_attempts=wish.max_attempts,
            webhook_url="https://example.com/hook" if wish.webhook else None,
            idempotency=wish.idempotency,
        )
        work = store.submit_failed(new, FAILURE) if wish.rejected else store.submit(new)
        if self.model.makes_a_job(new):
            made = self.run(work)
            assert made.id not in self.model.jobs
            job = self.model.submit(made.id, new, FAILURE.error_type if wish.rejected else None)
            assert (made.state, made.position) == (job.state, self.model.position(job))
        else:

            async def job_id() -> UUID:
                return (await work).id

            self.agree(lambda: (job := self.model.repeated(new)) and job.id, job_id())

    def read(self, store: JobStore, told: ModelJob) -> None:
        read = self.run(store.get(told.id))
        assert (read.state, read.attempt, read.position) == (told.state, told.attempt, self.model.position(told))
        assert (read.failure and read.failure.error_type) == told.error_type
        assert read.result == ({} if told.state is JobState.SUCCEEDED else None)
        assert [line.message for line in self.run(store.logs(told.id))] == told.logs

    # Workers.

    @rule(
        which=number,
        endpoints=st.sampled_from(SERVED),
        lease_s=seconds,
        run_s=st.none() | seconds,
        low_after_s=st.sampled_from([0, 30, 600]),
        times=st.integers(1, 4),
        at_once=st.booleans(),
        reports=st.lists(report, max_size=3),
    )
    def work(
        self,
        which: int,
        endpoints: list[str],
        lease_s: int,
        run_s: int | None,
        low_after_s: int,
        times: int,
        at_once: bool,
        reports: list[tuple[str, int, bool, int]],
    ) -> None:
        if at_once:
            self.claim_at_once(endpoints, lease_s, times)
        else:
            self.claim(which, endpoints, lease_s, run_s, low_after_s, times)
        self.report(which, reports)

    def claim(self, which: int, endpoints: list[str], lease_s: int, run_s: int | None, low_after_s: int, times: int) -> None:
        claimed, served = self.claimed[which % PROCESSES], tuple(endpoints)
        for _ in range(times):
            allowed = self.model.next(endpoints, claimed[served], low_after_s)
            claim = self.run(self.store(which).claims.take(endpoints, lease_s, run_s, low_after_s))
            assert (claim.job_id in allowed) if claim else not allowed
            if claim:
                claimed[served] += 1
                self.take(claim, lease_s, run_s)

    def claim_at_once(self, endpoints: list[str], lease_s: int, workers: int) -> None:
        """Workers of all processes claim at once: each gets a job of its own while there are any, in whatever order."""

        async def claims() -> list[Claim | None]:
            return await asyncio.gather(*(self.store(worker).claims.take(endpoints, lease_s) for worker in range(workers)))

        answers = self.run(claims())
        for worker, claim in enumerate(answers):
            if claim:
                assert claim.job_id in {job.id for job in self.model.may_start(endpoints)}
                self.claimed[worker % PROCESSES][tuple(endpoints)] += 1
                self.take(claim, lease_s, None)
        # a claim for several endpoints briefly locks the first job of each, so another claim may find nothing meanwhile
        assert None not in answers or len(set(endpoints)) > 1 or not self.model.may_start(endpoints)

    def take(self, claim: Claim, lease_s: int, run_s: int | None) -> None:
        self.model.claim(claim, lease_s, run_s)
        job = self.model.jobs[claim.job_id]
        assert (claim.attempt, claim.input) == (job.attempt, {"prompt": "a cat"})
        assert claim.resumes == ([state for state, _, _ in job.events].count("running") > 1)
        self.claims.append(claim)

    @precondition(lambda self: self.claims)
    @rule(which=number, reports=st.lists(report, min_size=1, max_size=3))
    def report(self, which: int, reports: list[tuple[str, int, bool, int]]) -> None:
        for report in reports:
            if self.claims:
                self.report_one(self.store(which), *report)

    def report_one(self, store: JobStore, what: str, claim: int, late: bool, wait_s: int) -> None:
        """crash: the worker reports nothing more, so the job stays leased until its lease expires."""
        held, model = self.any_claim(claim, late), self.model
        if what == "crash":
            self.claims.remove(held)
        elif what == "heartbeat":
            self.agree(lambda: model.heartbeat(held, 30), store.claims.heartbeat(held, 30))
        elif what == "log":
            self.agree(lambda: model.log(held, "step 1/4"), store.claims.log(held, "step 1/4"))
        elif what == "succeed":
            self.agree(lambda: model.close(held, JobState.SUCCEEDED, None), store.claims.succeed(held, {}, {}))
        elif what == "fail":
            self.agree(lambda: model.close(held, JobState.FAILED, FAILURE.error_type), store.claims.fail(held, FAILURE, {}))
        elif what == "cancel":
            self.agree(lambda: model.close(held, JobState.CANCELLED, "client_cancelled"), store.claims.cancel(held))
        else:
            counted = what == "requeue"
            self.agree(
                lambda: model.requeue(held, "the runner died", counted=counted, wait_s=wait_s),
                store.claims.requeue(held, "the runner died", counted=counted, wait_s=wait_s),
            )

    # Time, the sweep, the operator.

    @rule(
        which=number,
        seconds=seconds,
        sweeping=st.integers(0, 2),
        what=st.none() | st.sampled_from(["restart", "pause", "resume", "resume", "resume", "expire"]),
        endpoint=st.sampled_from(ENDPOINTS),
    )
    def time_passes(self, which: int, seconds: int, sweeping: int, what: str | None, endpoint: str) -> None:
        """sweeping: how many processes then sweep at once."""

        async def sweeps() -> int:
            return sum(await asyncio.gather(*(self.store(which + process).claims.sweep() for process in range(sweeping))))

        self.model.now += seconds
        self.run(self.sql.execute("UPDATE clock SET at = $1", at(self.model.now)))
        if sweeping:
            self.agree(self.model.sweep, sweeps())
        if what:
            self.operate(which, what, endpoint)

    def operate(self, which: int, what: str, endpoint: str) -> None:
        process = which % PROCESSES
        if what == "restart":
            self.run(self.stores[process].close())
            self.stores[process] = self.run(JobStore.open(self.url, max_connections=3))
            self.claimed[process].clear()
        elif what == "pause":
            self.run(self.stores[process].pause(endpoint))
            self.model.paused.add(endpoint)
        elif what == "resume":
            self.run(self.stores[process].resume(endpoint))
            self.model.paused.discard(endpoint)
        else:
            self.agree(lambda: self.model.expire_jobs(KEEP_JOBS_S), self.stores[process].retention.expire_jobs(KEEP_JOBS_S))

    # What always holds.

    @invariant()
    def nothing_is_lost_and_every_promise_kept(self) -> None:
        rows = {row["id"]: row for row in self.run(self.sql.fetch(SNAPSHOT))}
        assert rows.keys() == self.model.jobs.keys()
        for job_id, row in rows.items():
            self.is_what_the_model_says(row, self.model.jobs[job_id])
            self.keeps_its_promises(row, self.model.jobs[job_id].new)
        assert self.run(self.sql.fetch(OVER_LIMIT)) == []

    def is_what_the_model_says(self, row: asyncpg.Record, job: ModelJob) -> None:
        assert {column: row[column] for column in EXACT} == {column: getattr(job, column) for column in EXACT}
        assert [row[column] for column in TIMES] == [at(getattr(job, column)) for column in TIMES]
        assert row["position"] == self.model.position(job)
        assert [tuple(event) for event in json.loads(row["events"])] == job.events
        assert (row["logs"] or []) == job.logs
        if job.state is JobState.QUEUED:  # it means nothing later
            assert row["not_before"] == at(job.not_before)
        if job.state is JobState.RUNNING:
            assert (row["token"], row["lease_until"], row["run_by"]) == (job.token, at(job.lease_until), at(job.run_by))

    def keeps_its_promises(self, row: asyncpg.Record, new: NewJob) -> None:
        """Checks promises that hold independently of the model."""
        path = [JobState(state) for state, _, _ in json.loads(row["events"])]
        assert path[0] is JobState.QUEUED
        assert all(after in TRANSITIONS[before] for before, after in pairwise(path)), "so no two attempts run at once"
        assert path[-1] == row["state"]
        assert (row["webhooks"] or []) == ([new.webhook_url] if new.webhook_url and path[-1].ended else [])
        kept = row["soon_after"] if path[-1].ended else "infinity"
        assert row["checkpoint_until"] == (kept if JobState.RUNNING in path else None)


@contextmanager
def database_with_a_clock(server: str) -> Iterator[str]:
    """The URL of a migrated database whose time comes from its table `clock`. Its commits need not be durable."""
    name = f"clock_{uuid4().hex}"
    asyncio.run(execute(server, f"CREATE DATABASE {name}"))
    url = of_database(server, name)
    url += ("&" if "?" in url else "?") + "search_path=public,pg_catalog&synchronous_commit=off"
    try:
        asyncio.run(execute(url, CLOCK))
        asyncio.run(migrate(url))
        yield url
    finally:
        asyncio.run(execute(server, f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.mark.timeout(1200)  # Hypothesis needs minutes to shorten a failing sequence
def test_store_does_what_its_model_does(embedded_server: str) -> None:
    with database_with_a_clock(embedded_server) as url:
        run_state_machine_as_test(
            type("Machine", (StoreMachine,), {"url": url}),
            settings=settings(
                max_examples=int(EXAMPLES or 15),
                stateful_step_count=40,
                derandomize=EXAMPLES is None,
                database=None,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )


def test_store_reads_no_clock_that_the_model_does_not_move() -> None:
    files = [*SQL.iterdir(), *SQL.joinpath("migrations").iterdir()]
    other = re.compile(
        r"current_(date|time)|(statement|transaction)_timestamp|localtime|timeofday|'now'|pg_catalog\.now", re.IGNORECASE
    )
    assert not [file.name for file in files if file.name.endswith(".sql") and other.search(file.read_text())]
