"""The workers' side of the queue: an attempt at a job is claimed, kept by heartbeats, and ended with an outcome.

A worker writes with its attempt's token, so a worker that comes too late changes nothing and is told so by `LeaseLost`.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from typing import Any
from uuid import UUID, uuid4

import asyncpg

from deployments.jobs.database import QUERIES, Database, StoreAway, storable
from deployments.jobs.job import Claim, JobState, LeaseLost
from deployments.jobs.listener import WORK, Changes
from deployments.schemas.failures import Failure, error_failure
from deployments.schemas.submission import RetryCondition
from engines.errors import Cancelled, GenerationTimeout, ReelrayError, RunnerDisconnected, StartTimeout

LOW_AFTER_S = 600.0
"""How long a job of low priority waits before it gets a share of the claims; see `Claims.take`."""
LOW_SHARE = 4
MAX_MESSAGE = 2000
"""Characters of a log line; longer ones are cut."""


class Claims:
    """Attempts at the jobs of a database. Any number of processes may claim at once."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._taken: Counter[tuple[str, ...]] = Counter()

    async def take(
        self, endpoints: Sequence[str], lease_s: float, run_s: float | None = None, low_after_s: float = LOW_AFTER_S
    ) -> Claim | None:
        """Claims the next job: by priority, then one of each owner in turn, then by age.

        None: nothing is waiting that may run. The endpoint may be paused, or the jobs' keys already have as many jobs running as
        they may. With several endpoints it can also mean that other claims are looking at all such jobs; each of them takes one
        and leaves the others.

        run_s: how long the attempt may take; if its worker dies, the job is not tried again after that. low_after_s: low priority
        goes behind all others, but once the first such job has waited this long, every `LOW_SHARE`th claim takes it before them.
        So neither can keep the other waiting for ever: a flood of low jobs gets that share and no more.
        A call that is cancelled leaves no job behind.
        """
        served, token = tuple(endpoints), uuid4()
        low_first = (self._taken[served] + 1) % LOW_SHARE == 0
        try:
            while rows := await self._fetch("claim", served, token, lease_s, run_s, low_first, low_after_s):
                if rows[0]["job_id"] is not None:
                    self._taken[served] += 1
                    return Claim(**rows[0])
        except asyncio.CancelledError:
            with suppress(StoreAway):
                await self._give_back(token)
            raise
        return None

    async def _give_back(self, token: UUID) -> None:
        """A claim may have been committed although its caller was cancelled before the answer came."""

        async def requeue(connection: asyncpg.Connection) -> list[asyncpg.Record]:
            for row in await connection.fetch(QUERIES["claimed"], token):
                args = (row["id"], token, "the worker stopped", False, _lost_attempt_failures(), 0.0, None, None)
                await connection.fetch(QUERIES["requeue"], *args)
            return []

        await self._database.run(requeue, ride_out_s=0.0)

    async def heartbeat(self, claim: Claim, lease_s: float) -> bool:
        """Keeps the job for `lease_s` more seconds. True: its caller wants it cancelled. Raises `LeaseLost`."""
        rows = await self._fetch("heartbeat", claim.job_id, claim.token, lease_s)
        cancel_requested: bool = _held(rows)[0]["cancel_requested"]
        return cancel_requested

    async def log(
        self,
        claim: Claim,
        message: str,
        level: str = "INFO",
        progress: Mapping[str, Any] | None = None,
        line_id: UUID | None = None,
    ) -> bool:
        """Adds a line for the caller. False: the log is full, with 2,000 lines and one that says so. Raises `LeaseLost`.

        line_id: a repeated call with the same one adds nothing.
        """
        if len(message) > MAX_MESSAGE:
            message = message[: MAX_MESSAGE - 1] + "…"
        rows = await self._fetch("log", claim.job_id, claim.token, level, storable(message), progress, line_id or uuid4())
        added: bool = _held(rows)[0]["added"]
        return added

    async def succeed(self, claim: Claim, result: dict[str, Any], metrics: dict[str, Any]) -> None:
        """Closes the job with its result. Raises `LeaseLost`."""
        await self._close(claim, JobState.SUCCEEDED, result, None, metrics)

    async def fail(self, claim: Claim, failure: Failure, metrics: dict[str, Any]) -> None:
        """Closes the job with what its caller will be told. Raises `LeaseLost`."""
        await self._close(claim, JobState.FAILED, None, asdict(failure), metrics)

    async def cancel(self, claim: Claim) -> None:
        """Closes the job as its caller asked. Raises `LeaseLost`."""
        await self._close(claim, JobState.CANCELLED, None, _failure(Cancelled), {})

    async def requeue(
        self,
        claim: Claim,
        reason: str,
        *,
        counted: bool,
        wait_s: float = 0.0,
        lost_in: Mapping[str, int] | None = None,
        retries: Mapping[RetryCondition, int] | None = None,
    ) -> None:
        """Gives the job back, to its old place in the order; cancels it if that was asked for.

        counted: the attempt failed, and the last one fails the job; otherwise it does not count (we are shutting down).
        wait_s: seconds for which it is not tried again. lost_in, retries: replace the claim's, if given. Raises `LeaseLost`.
        """
        args = (claim.job_id, claim.token, storable(reason), counted, _lost_attempt_failures(), wait_s, lost_in, retries)
        _held(await self._fetch("requeue", *args))

    async def sweep(self) -> int:
        """Takes jobs from workers that fell silent and fails those past a deadline, 1,000 of each at most.

        It also returns jobs that have waited for their next attempt, and forgets idempotency keys that have ended. Any number of
        processes may sweep at once. Returns how many jobs it took or failed. It does not wait for a database that is away.
        """
        failures = _lost_attempt_failures() | {"overran": _failure(GenerationTimeout)}

        async def sweep_all(connection: asyncpg.Connection) -> list[asyncpg.Record]:
            expired = await connection.fetch(QUERIES["sweep_leases"], failures)
            overdue = await connection.fetch(QUERIES["sweep_deadlines"], _failure(StartTimeout))
            await connection.fetch(QUERIES["sweep_delays"])
            await connection.fetch(QUERIES["sweep_keys"])
            return [*expired, *overdue]

        return len(await self._database.run(sweep_all, ride_out_s=0.0))

    @asynccontextmanager
    async def watch_work(self) -> AsyncIterator[Changes]:
        """Hears of every job that is queued from now on, whatever its endpoint."""
        with self._database.watch(WORK) as changes:
            yield changes

    async def _close(
        self,
        claim: Claim,
        state: JobState,
        result: dict[str, Any] | None,
        failure: dict[str, Any] | None,
        metrics: dict[str, Any],
    ) -> None:
        _held(await self._fetch("close", claim.job_id, claim.token, state.value, result, failure, metrics))

    async def _fetch(self, query: str, *args: object) -> list[asyncpg.Record]:
        return await self._database.fetch(QUERIES[query], *args)


def _failure(error: type[ReelrayError]) -> dict[str, Any]:
    return asdict(error_failure(error()))


def _lost_attempt_failures() -> dict[str, dict[str, Any]]:
    return {JobState.CANCELLED: _failure(Cancelled), JobState.FAILED: _failure(RunnerDisconnected)}


def _held(rows: list[asyncpg.Record]) -> list[asyncpg.Record]:
    """The rows that a worker's write touched. Raises `LeaseLost` if there are none."""
    if not rows:
        raise LeaseLost
    return rows
