"""The jobs, durable: every promise the queue makes is kept by one statement or one transaction of `sql/queries.sql`.

A submission is answered after its commit. A change of state, its event and its webhook are one transaction, made by the
database's own triggers (`sql/triggers.sql`), whoever writes. What workers do with jobs is in `claims.py`.
"""

import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from typing import Any, NamedTuple, Self
from uuid import UUID

import asyncpg

from deployments import metrics
from deployments.jobs.claims import Claims
from deployments.jobs.coalescing import Coalescer
from deployments.jobs.database import CONNECTIONS, QUERIES, Database, Json, StoreAway, storable, to_json
from deployments.jobs.job import Job, JobEvent, JobState, JobSummary, LogLine, NewJob
from deployments.jobs.keys import Keys
from deployments.jobs.listener import Changes, job_subject, lines_subject
from deployments.jobs.queue_position import STEP, Place, QueuePositions
from deployments.jobs.retention import Retention
from deployments.jobs.uploads import Uploads
from deployments.schemas.failures import Failure, error_failure
from engines.errors import Cancelled, IdempotencyKeyReused

UNWELL_S = 10.0
"""For how long a submission that could not be stored means that others could not be either, until one has been."""
COALESCED_BYTES = 65_536
"""An input above this is submitted by itself: it takes its time, and no other submission should wait for it."""


class _Submission(NamedTuple):
    """The parameters of the statement `submit`."""

    id: UUID
    endpoint: str
    owner: str | None
    priority: int
    input: Json
    start_timeout_s: float | None
    max_attempts: int
    webhook_url: str | None
    key: str | None
    fingerprint: bytes | None
    keep_s: float | None
    rejected: bool
    files_s: float | None
    store_io: bool
    service_url: str | None
    files: tuple[str, ...]
    notes: tuple[str, ...]
    input_version: int
    retries: Json
    files_access: dict[str, Any] | None
    traceparent: str | None
    units: tuple[float, float, float]
    parallel: int


@dataclass(frozen=True)
class QueueStatus:
    """One endpoint's queue. delayed: queued jobs that wait for their next attempt. paused_at: None if it is not paused."""

    queued: int
    delayed: int
    running: int
    paused_at: datetime | None


@dataclass(frozen=True)
class QueueGauge:
    """An endpoint's queue for its metrics. oldest_s: for how many seconds the oldest queued job has waited; 0 if none waits."""

    endpoint: str
    queued: int
    delayed: int
    running: int
    oldest_s: float
    paused: bool


class JobStore:
    """The queue: submissions, reads and the operator's switches here; beside them `claims`, `keys`, `retention` and
    `uploads`.

    Make it with `open`; it belongs to one event loop. Every call may raise `StoreAway`.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        self.claims = Claims(database)
        self.keys = Keys(database)
        self.retention = Retention(database)
        self.uploads = Uploads(database)
        self._positions: dict[str, QueuePositions] = {}
        self._reads = Coalescer(self._read)
        self._submissions = Coalescer(self._insert)
        self._unwell_until = 0.0

    @classmethod
    async def open(cls, url: str, *, max_connections: int = CONNECTIONS, upgrades: bool = False) -> Self:
        """A store on a database of its own; see `Database.open`."""
        return cls(await Database.open(url, max_connections=max_connections, upgrades=upgrades))

    async def close(self) -> None:
        """Closes the database."""
        await self.database.close()

    async def check(self) -> None:
        """Raises `StoreAway` if jobs cannot be submitted: the database is away, read-only, or has just failed to store one."""
        if time.monotonic() < self._unwell_until:  # on a full disk it still answers
            raise StoreAway("the last submission could not be stored")
        await self.database.check()

    # For the door.

    async def submit(self, new: NewJob) -> Job:
        """Queues a job. When this returns, the job survives any crash.

        If its idempotency key already stands for a job, returns that job. Raises `IdempotencyKeyReused` if that job was
        submitted with another body.
        """
        while True:
            job_id = _new_id()
            row = await self._submit(_submission(job_id, new))
            if row is not None:
                return await self._job(row)
            if job := await self._submitted(job_id, new):
                return job

    async def _submit(self, submission: _Submission) -> asyncpg.Record | None:
        """The new job's row, if it is new."""
        try:
            if len(submission.input) <= COALESCED_BYTES:
                row = await self._submissions.ask(submission)
            else:
                row = next(iter(await self._fetch("submit", *submission)), None)
        except StoreAway:
            self._unwell_until = time.monotonic() + UNWELL_S
            raise
        self._unwell_until = 0.0
        return row

    async def _insert(self, submissions: Sequence[_Submission]) -> Sequence[asyncpg.Record | Exception | None]:
        """The same for several at once, in one transaction. If one of them cannot be written, each is tried by itself."""
        # keys are always taken in the same order, or two transactions might wait for each other
        ordered = sorted(submissions, key=lambda submission: (submission.owner or "", submission.key or ""))
        try:
            rows = await self.database.run(lambda connection: connection.fetchmany(QUERIES["submit"], ordered))
        except StoreAway:
            raise
        except Exception as exc:
            if len(submissions) == 1:
                return [exc]
            return [answer for each in submissions for answer in await self._insert([each])]
        made = {row["id"]: row for row in rows}
        return [made.get(submission.id) for submission in submissions]

    async def submit_failed(self, new: NewJob, failure: Failure) -> Job:
        """Records a job that failed before it could begin, so that its webhook is sent.

        Its idempotency key stands for it until the same owner submits another body under that key.
        """
        while True:
            job_id = _new_id()
            if job := await self._submitted(await self._submit_failed(job_id, new, failure), new):
                return job

    async def _submit_failed(self, job_id: UUID, new: NewJob, failure: Failure) -> UUID:
        async def both(connection: asyncpg.Connection) -> list[asyncpg.Record]:
            async with connection.transaction():
                await connection.fetch(QUERIES["submit"], *_submission(job_id, new, rejected=True))
                return list(await connection.fetch(QUERIES["submit_failed"], job_id, asdict(failure)))

        await self.database.run(both)
        return job_id

    async def _submitted(self, job_id: UUID, new: NewJob) -> Job | None:
        """The job of a submission that may have made no new row: the one that a first try made, whose answer was lost, or the one
        of its idempotency key. None: the key has become free in the meantime, try again."""
        return await self.get(job_id) or await self.repeated(new)

    async def repeated(self, new: NewJob) -> Job | None:
        """The job of an earlier submission that this one repeats. Raises `IdempotencyKeyReused`."""
        if new.idempotency is None:
            return None
        rows = await self._fetch("repeated", new.owner, new.idempotency.key, new.idempotency.fingerprint)
        if not rows:
            return None
        if not rows[0]["same"]:
            raise IdempotencyKeyReused
        return await self.get(rows[0]["job_id"])

    async def get(self, job_id: UUID, lines_after: int | None = None) -> Job | None:
        """The job as it stands. Its position is exact up to 200; beyond that it is rounded to 200 and some seconds old.

        lines_after: adds its lines whose `seq` is above this; None adds none.
        """
        row = await self._reads.ask((job_id, lines_after))
        return None if row is None else await self._job(row)

    async def logs(self, job_id: UUID, after: int = 0) -> list[LogLine]:
        """The job's lines whose `seq` is above `after`."""
        job = await self.get(job_id, lines_after=after)
        return list(job.lines) if job else []

    async def _read(self, asked: Sequence[tuple[UUID, int | None]]) -> Sequence[asyncpg.Record | None]:
        rows: list[asyncpg.Record | None] = [None] * len(asked)
        for row in await self._fetch("get", [job_id for job_id, _ in asked], [after for _, after in asked]):
            rows[row["place"] - 1] = row
        return rows

    async def request_cancel(self, job_id: UUID) -> JobState | None:
        """Cancels a queued job, or asks a running one to stop. Returns the state it found; None: there is no such job."""
        rows = await self._fetch("request_cancel", job_id, asdict(error_failure(Cancelled())))
        if not rows:
            return None
        metrics.CANCELS.record(state=rows[0]["state"])
        return JobState(rows[0]["state"])

    async def queued(self, endpoint: str, *, at_most: int | None = None) -> int:
        """How many jobs wait, counted no further than `at_most`: counting takes 50 ms per million jobs."""
        rows = await self._fetch("queued", endpoint, at_most)
        count: int = rows[0]["count"]
        return count

    @asynccontextmanager
    async def watch(self, job_id: UUID) -> AsyncIterator[Changes]:
        """Hears every change of a job from now on. Read the job after entering, and again after each change."""
        with self.database.watch(job_subject(job_id)) as changes:
            yield changes

    @asynccontextmanager
    async def watch_lines(self, job_id: UUID) -> AsyncIterator[Changes]:
        """Hears every change and log line of a job from now on."""
        with self.database.watch(job_subject(job_id), lines_subject(job_id)) as changes:
            yield changes

    # For the operator.

    async def pause(self, endpoint: str) -> None:
        """From now on no job of the endpoint starts, in any process. Running jobs go on, and new ones are accepted."""
        await self._fetch("pause", endpoint)

    async def resume(self, endpoint: str) -> None:
        """Ends a pause, if there is one."""
        await self._fetch("resume", endpoint)

    async def queue_status(self, endpoint: str) -> QueueStatus:
        """An endpoint's queue. It counts the jobs, which takes 50 ms per million."""
        return QueueStatus(**(await self._fetch("queue_status", endpoint))[0])

    async def queue_gauges(self, endpoints: Sequence[str]) -> list[QueueGauge]:
        """The queues of some endpoints. It counts the jobs, as `queue_status` does."""
        return [QueueGauge(**row) for row in await self._fetch("queue_gauges", endpoints)]

    async def timeline(self, job_id: UUID) -> list[JobEvent]:
        """Every state the job has been in, in order. Empty: there is no such job."""
        rows = await self._fetch("timeline", job_id)
        return [JobEvent(row["at"], JobState(row["state"]), row["attempt"], row["reason"]) for row in rows]

    async def recent(self, limit: int, endpoint: str | None = None, state: JobState | None = None) -> list[JobSummary]:
        """The jobs submitted last, newest first. endpoint, state: only those; None: any."""
        rows = await self._fetch("recent", limit, endpoint, state)
        return [JobSummary(**{**row, "state": JobState(row["state"])}) for row in rows]

    async def _job(self, row: Mapping[str, Any]) -> Job:
        place, position = (row["priority"], row["turn"], row["number"]), row["ahead"]
        if position == STEP:
            endpoint = row["endpoint"]
            positions = self._positions.setdefault(endpoint, QueuePositions(partial(self._marks, endpoint)))
            position = await positions.ahead(place)
        return Job(
            id=row["id"],
            endpoint=row["endpoint"],
            owner=row["owner"],
            state=JobState(row["state"]),
            created_at=row["created_at"],
            started_at=row["started_at"],
            finished_at=row["finished_at"],
            attempt=row["attempt"],
            cancel_requested=row["cancel_requested"],
            position=position,
            result=row["result"],
            failure=row["failure"] and Failure(**row["failure"]),
            metrics=row["metrics"],
            lines=tuple(LogLine(*line) for line in row.get("lines") or ()),
            traceparent=row["traceparent"],
        )

    async def _marks(self, endpoint: str) -> list[Place]:
        return [tuple(row) for row in await self._fetch("marks", endpoint)]

    async def _fetch(self, query: str, *args: object) -> list[asyncpg.Record]:
        return await self.database.fetch(QUERIES[query], *args)


def _new_id() -> UUID:
    """A UUIDv7 (RFC 9562, 5.7): 48 bits of milliseconds, then 74 random bits. It is ordered by time, so a commit writes the last
    page of the primary key and not any page of it: with a million jobs 2,300 submits a second instead of 600."""
    chance = secrets.randbits(74)
    high = time.time_ns() // 1_000_000 << 16 | 7 << 12 | chance >> 62
    return UUID(int=high << 64 | 0b10 << 62 | chance & (1 << 62) - 1)


def _submission(job_id: UUID, new: NewJob, *, rejected: bool = False) -> _Submission:
    once = new.idempotency
    return _Submission(
        id=job_id,
        endpoint=new.endpoint,
        owner=new.owner,
        priority=new.priority,
        input=to_json(new.input),
        start_timeout_s=new.start_timeout_s,
        max_attempts=new.max_attempts,
        webhook_url=new.webhook_url,
        key=once.key if once else None,
        fingerprint=once.fingerprint if once else None,
        keep_s=once.keep_s if once else None,
        rejected=rejected,
        files_s=new.files_s,
        store_io=new.store_io,
        service_url=new.service_url,
        files=new.files,
        notes=tuple(map(storable, new.notes)),
        input_version=new.input_version,
        retries=to_json(dict(new.retries)),
        files_access=new.files_access,
        traceparent=new.traceparent,
        units=new.units,
        parallel=new.parallel,
    )
