"""The jobs, durable: every promise the queue makes is kept by one statement or one transaction of `sql/queries.sql`.

A submission is answered after its commit. A worker writes with its attempt's token, so one that comes late changes nothing.
State change, event and webhook are one transaction by the database's own triggers (`sql/migrations/`), whoever writes. Every
call may be repeated after a lost connection, and is, for a few seconds: a database that restarts delays callers, no more.
"""

import asyncio
import hashlib
import json
import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from importlib.resources import files
from typing import Any, NamedTuple, Self
from uuid import UUID, uuid4

import asyncpg

from deployments.jobs.coalescing import Coalescer
from deployments.jobs.job import Claim, Job, JobState, LeaseLost, LogLine, NewJob
from deployments.jobs.keys import DEFAULT_SCOPES, ApiKey, KeySecret, Scope
from deployments.jobs.listener import Changes, Listener
from deployments.jobs.queue_position import STEP, Place, QueuePositions
from deployments.schemas.failures import Failure, error_failure
from engines.errors import Cancelled, GenerationTimeout, IdempotencyKeyReused, ReelrayError, RunnerDisconnected, StartTimeout

RIDE_OUT_S = 10.0
"""How long a call outlasts a database that is away; a killed embedded server is back within two."""
KEY_CACHE_S = 2.0
"""How long an API key or secret that has ended may still be taken, by a process that has just seen it."""
OLDEST_SERVER = 15
"""The oldest major version of PostgreSQL that the store's suite runs on. Older ones might do; nobody has tried."""
LOW_AFTER_S = 600.0
"""How long low priority is only that; see `JobStore.claim`."""
LOW_SHARE = 4
EXPIRY_BATCH = 100
"""What is deleted in one transaction: an input may be megabytes, and a file a round trip to an object store."""
COALESCED_BYTES = 65_536
"""An input above this is submitted by itself: it takes its time, and nobody else should wait for it."""
MAX_MESSAGE = 2000
"""Characters of a log line; longer ones are cut."""
UNSTORED_S = 3600.0
"""For fetching the result of a job whose payloads are not to be stored; fal gives the same (protocol page 2.4)."""

logger = logging.getLogger(__name__)

_MIGRATION_LOCK = 0x7265656C
_AWAY = (
    OSError,
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
    asyncpg.TooManyConnectionsError,
)
_SESSION = {
    # Every statement here is written to read by an index, whatever is in it: planned once, and never as a scan because the tables
    # happened to be small or unvacuumed then. With plans made anew a status read took 300 µs of the database's time, not 80.
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "random_page_cost": "1.1",
    "jit": "off",
}
_RESOURCES = files("deployments.jobs").joinpath("sql")


def load_queries(text: str) -> dict[str, str]:
    """Name -> statement of a file in which every statement follows its `-- name:` line."""
    _, *parts = re.split(r"^-- name: (\w+)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


_SQL = load_queries(_RESOURCES.joinpath("queries.sql").read_text())


class _Json(str):
    """Text that is JSON already, and not yet to become it."""


class _Submission(NamedTuple):
    """The parameters of the statement `submit`."""

    id: UUID
    endpoint: str
    owner: str | None
    priority: int
    input: _Json
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


class StoreAway(Exception):
    """The database cannot be reached, and has not been for `RIDE_OUT_S` seconds."""


class ServerTooOld(RuntimeError):
    """The database server is older than the store is tested on."""


@dataclass(frozen=True)
class QueueStatus:
    """One endpoint's queue. delayed: those of the queued that wait for their next attempt. paused_at: None while it is open."""

    queued: int
    delayed: int
    running: int
    paused_at: datetime | None


class JobStore:
    """The queue, for the door and for dispatchers. Make it with `open`; it belongs to one event loop."""

    def __init__(self, pool: asyncpg.Pool, listener: Listener) -> None:
        self._pool = pool
        self._listener = listener
        self._positions: dict[str, QueuePositions] = {}
        self._secrets: dict[bytes | UUID, tuple[KeySecret, float]] = {}
        self._claimed: Counter[tuple[str, ...]] = Counter()
        self._reads = Coalescer(self._read)
        self._submissions = Coalescer(self._insert)

    @classmethod
    async def open(cls, url: str, *, max_connections: int = 8) -> Self:
        """Connects, brings the schema up to date and listens: `max_connections` and one more.

        Raises `StoreAway` as calls do, `ServerTooOld`.
        """
        deadline = time.monotonic() + RIDE_OUT_S
        while True:
            try:
                return await cls._open(url, max_connections)
            except _AWAY as exc:
                if time.monotonic() > deadline:
                    raise StoreAway(str(exc)) from exc
                await asyncio.sleep(0.1)

    @classmethod
    async def _open(cls, url: str, max_connections: int) -> Self:
        await migrate(url)
        pool = await asyncpg.create_pool(
            url,
            min_size=1,
            max_size=max_connections,
            init=_use_json,
            reset=_keep_session,
            command_timeout=60,
            server_settings=_SESSION,
        )
        listener = Listener(url)
        try:
            await listener.start()
        except BaseException:
            pool.terminate()
            raise
        return cls(pool, listener)

    async def close(self) -> None:
        """Lets running statements finish and closes every connection."""
        await self._listener.stop()
        await self._pool.close()

    # For the door.

    async def submit(self, new: NewJob) -> Job:
        """Queues a job. When this returns, the job survives any crash.

        With an idempotency key that stands for a job already, that one is the answer. Raises `IdempotencyKeyReused` if that
        was another submission.
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
        if len(submission.input) <= COALESCED_BYTES:
            return await self._submissions.ask(submission)
        rows = await self._fetch("submit", *submission)
        return rows[0] if rows else None

    async def _insert(self, submissions: Sequence[_Submission]) -> Sequence[asyncpg.Record | Exception | None]:
        """The same for some at once, in one transaction; so if one of them cannot be written, each is tried by itself."""
        # whoever takes several keys takes them in one order, or two might wait for each other
        ordered = sorted(submissions, key=lambda submission: (submission.owner or "", submission.key or ""))
        try:
            rows = await self._outlast(lambda connection: connection.fetchmany(_SQL["submit"], ordered))
        except (StoreAway, TimeoutError):
            raise
        except Exception as exc:
            if len(submissions) == 1:
                return [exc]
            return [answer for each in submissions for answer in await self._insert([each])]
        made = {row["id"]: row for row in rows}
        return [made.get(submission.id) for submission in submissions]

    async def submit_failed(self, new: NewJob, failure: Failure) -> Job:
        """Records a job that has failed before it could begin, so that its webhook tells of it.

        An idempotency key stands for it until the same owner submits another body under it.
        """

        while True:
            job_id = _new_id()
            if job := await self._submitted(await self._submit_failed(job_id, new, failure), new):
                return job

    async def _submit_failed(self, job_id: UUID, new: NewJob, failure: Failure) -> UUID:
        async def both(connection: asyncpg.Connection) -> list[asyncpg.Record]:
            async with connection.transaction():
                await connection.fetch(_SQL["submit"], *_submission(job_id, new, rejected=True))
                return list(await connection.fetch(_SQL["submit_failed"], job_id, asdict(failure)))

        await self._outlast(both)
        return job_id

    async def _submitted(self, job_id: UUID, new: NewJob) -> Job | None:
        """What came of a submission that made no row under this id, or need not have: the job of a first try whose answer was
        lost, or that of its idempotency key. None: the key came free in between, try again."""
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
        """The job as it stands. Its position is exact to 200, beyond that to 200 and some seconds old.

        lines_after: with those of its lines whose `seq` is above this; without any unless given.
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
        """Cancels a queued job, flags a running one. Answers the state it found; None: there is no such job."""
        rows = await self._fetch("request_cancel", job_id, _failure(Cancelled))
        return JobState(rows[0]["state"]) if rows else None

    async def queued(self, endpoint: str, *, at_most: int | None = None) -> int:
        """How many jobs wait. Counting a long queue takes time (50 ms a million): who needs a limit gives it."""
        rows = await self._fetch("queued", endpoint, at_most)
        count: int = rows[0]["count"]
        return count

    @asynccontextmanager
    async def watch(self, job_id: UUID) -> AsyncIterator[Changes]:
        """Hears every change of a job from now on, so read the job after entering, and again after each."""
        with self._listener.subscribed(str(job_id)) as changes:
            yield changes

    @asynccontextmanager
    async def watch_lines(self, job_id: UUID) -> AsyncIterator[Changes]:
        """Hears every change and log line of a job from now on."""
        with self._listener.subscribed(str(job_id), f"lines {job_id}") as changes:
            yield changes

    # For the dispatcher.

    async def claim(
        self, endpoints: Sequence[str], lease_s: float, run_s: float | None = None, low_after_s: float = LOW_AFTER_S
    ) -> Claim | None:
        """Takes the next job: by priority, then one of each owner in turn, then by age. None: nothing is waiting that may run,
        for its endpoint may be paused or its key have all the jobs running that it may; or, asked for several endpoints, all
        that may is in the hands of another claim, which takes one job and leaves the others.

        run_s: how long the attempt may take; should its worker die, the job is not tried again after that. low_after_s: low
        priority goes behind all others, but once the first such job has waited this long, every `LOW_SHARE`th claim takes it
        before them. So neither can keep the other waiting for ever: a flood of low jobs gets that share and no more.
        A claim whose answer was lost is swept up when its lease ends; this then takes the job after it.
        """
        served = tuple(endpoints)
        low_first = (self._claimed[served] + 1) % LOW_SHARE == 0
        while rows := await self._fetch("claim", served, uuid4(), lease_s, run_s, low_first, low_after_s):
            if rows[0]["job_id"] is not None:
                self._claimed[served] += 1
                return Claim(**rows[0])
        return None

    async def heartbeat(self, claim: Claim, lease_s: float) -> bool:
        """Keeps the job for `lease_s` more seconds. True: its caller wants it cancelled. Raises `LeaseLost`."""
        rows = await self._fetch("heartbeat", claim.job_id, claim.token, lease_s)
        cancel_requested: bool = _held(rows)[0]["cancel_requested"]
        return cancel_requested

    async def log(self, claim: Claim, message: str, level: str = "INFO", progress: Mapping[str, Any] | None = None) -> bool:
        """Adds a line for the caller. False: the log is full, having 2,000 lines and one that says so. Raises `LeaseLost`."""
        if len(message) > MAX_MESSAGE:
            message = message[: MAX_MESSAGE - 1] + "…"
        rows = await self._fetch("log", claim.job_id, claim.token, level, _storable(message), progress)
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

    async def requeue(self, claim: Claim, reason: str, *, counted: bool, wait_s: float = 0.0) -> None:
        """Gives the job back, to its old place in the order; cancels it if that was asked for.

        counted: the attempt failed, and the last one fails the job; otherwise it does not count (we are shutting down).
        wait_s: seconds for which it is not tried again. Raises `LeaseLost`.
        """
        args = (claim.job_id, claim.token, _storable(reason), counted, _lost_attempt_failures(), wait_s)
        _held(await self._fetch("requeue", *args))

    async def sweep(self) -> int:
        """Takes jobs from workers that fell silent and fails those past a deadline, 1,000 of each at most.

        Any number of processes may do so at once. How many jobs it changed.
        """
        overran = {"overran": _failure(GenerationTimeout)}
        expired = await self._fetch("sweep_leases", _lost_attempt_failures() | overran)
        overdue = await self._fetch("sweep_deadlines", _failure(StartTimeout))
        await self._fetch("sweep_delays")
        await self._fetch("sweep_keys")
        return len(expired) + len(overdue)

    @asynccontextmanager
    async def watch_work(self) -> AsyncIterator[Changes]:
        """Hears of every job that is queued from now on, whatever its endpoint."""
        with self._listener.subscribed("work") as changes:
            yield changes

    # Retention.

    async def add_file(self, name: str, keep_s: float) -> None:
        """Notes a file before it is written, so that it will expire whatever becomes of its job."""
        await self._fetch("add_file", name, keep_s)

    async def expire_files(self, delete: Callable[[str], Awaitable[None]]) -> int:
        """Deletes files whose time is over, `EXPIRY_BATCH` at most, and forgets them. How many it found.

        delete: of a file that may be gone already; its error postpones the file. Any number of processes may do so at once.
        """

        async def expire(connection: asyncpg.Connection) -> list[asyncpg.Record]:
            async with connection.transaction():  # holds the rows: nobody else deletes the same files meanwhile
                rows = list(await connection.fetch(_SQL["expired_files"], EXPIRY_BATCH))
                gone, stuck = list[str](), list[str]()
                for name in (row["name"] for row in rows):
                    try:
                        await delete(name)
                        gone.append(name)
                    except Exception:  # each kind of file store has errors of its own, and none may stop the dispatcher
                        logger.warning("a file could not be deleted", exc_info=True, extra={"action": "expiry", "file": name})
                        stuck.append(name)
                await connection.fetch(_SQL["forget_files"], gone)
                await connection.fetch(_SQL["postpone_files"], stuck)
                return rows

        return len(await self._outlast(expire))

    async def expire_jobs(self, jobs_s: float | None) -> int:
        """Deletes jobs that ended `jobs_s` seconds ago (None: none) and, sooner, those not to be stored, with their events, logs
        and webhooks; `EXPIRY_BATCH` of each at most. A job stays while its webhook is still to be delivered. How many."""
        old = await self._fetch("expire_jobs", jobs_s, EXPIRY_BATCH)
        unstored = await self._fetch("expire_unstored_jobs", UNSTORED_S, EXPIRY_BATCH)
        return len(old) + len(unstored)

    async def expire_secrets(self) -> int:
        """Deletes the secrets of keys that were replaced and whose time is over. How many."""
        return len(await self._fetch("expire_secrets"))

    # For the operator.

    async def pause(self, endpoint: str) -> None:
        """Lets no more jobs of the endpoint start, anywhere, from now on; those that run go on, new ones are accepted."""
        await self._fetch("pause", endpoint)

    async def resume(self, endpoint: str) -> bool:
        """Ends a pause. False: there was none."""
        return bool(await self._fetch("resume", endpoint))

    async def queue_status(self, endpoint: str) -> QueueStatus:
        """How an endpoint's queue stands. It counts the jobs, so it takes 50 ms a million."""
        return QueueStatus(**(await self._fetch("queue_status", endpoint))[0])

    # For the tables beside the jobs.

    async def outlast(self, work: Callable[[asyncpg.Connection], Any]) -> list[asyncpg.Record]:
        """Does `work`, which may be repeated, on a connection, with the endurance of every call here. Raises `StoreAway`."""
        return await self._outlast(work)

    @asynccontextmanager
    async def watch_subject(self, subject: str) -> AsyncIterator[Changes]:
        """Hears everything that the database says about `subject` from now on."""
        with self._listener.subscribed(subject) as changes:
            yield changes

    # API keys.

    async def create_key(self, name: str, max_running: int | None = None, scopes: Sequence[Scope] = DEFAULT_SCOPES) -> str:
        """Makes a key and answers its secret, `<id>:<256 random bits>`, which is kept as a hash only and so never shown again.

        max_running: how many of its jobs may run at once, at all endpoints together; the others wait and block nobody.
        """
        key_id = secrets.token_hex(8)
        secret = _new_secret(key_id)
        await self._fetch("create_key", key_id, _storable(name), _hash(secret), max_running, list(scopes))
        return secret

    async def rotate_key(self, key_id: str, overlap_s: float) -> str | None:
        """Gives a key another secret and answers it; those it had end in `overlap_s`. None: there is no such key, or no longer.

        What belongs to the key stays its own. Tokens end with the secret that they were asked for with.
        """
        key_id = _storable(key_id)
        secret = _new_secret(key_id)

        async def rotate(connection: asyncpg.Connection) -> list[asyncpg.Record]:
            async with connection.transaction():
                rows = list(await connection.fetch(_SQL["lock_key"], key_id))
                if rows:
                    await connection.fetch(_SQL["retire_secrets"], key_id, _hash(secret), overlap_s)
                    await connection.fetch(_SQL["add_secret"], key_id, _hash(secret))
                return rows

        rotated = await self._outlast(rotate)
        self._secrets.clear()
        return secret if rotated else None

    async def list_keys(self) -> list[ApiKey]:
        """Every key, the revoked ones included."""
        return [ApiKey(**row) for row in await self._fetch("list_keys")]

    async def revoke_key(self, key_id: str) -> bool:
        """Ends a key, within `KEY_CACHE_S` everywhere. False: there is no such key, or no longer."""
        revoked = await self._fetch("revoke_key", _storable(key_id))
        self._secrets.clear()
        return bool(revoked)

    async def find_secret(self, secret: str) -> KeySecret | None:
        """What is known of a secret; None: nobody's, or no longer."""
        return await self._known_secret("find_secret", _hash(secret))

    async def get_secret(self, secret_id: UUID) -> KeySecret | None:
        """The same by its id, for who has a token."""
        return await self._known_secret("get_secret", secret_id)

    async def _known_secret(self, query: str, name: bytes | UUID) -> KeySecret | None:
        if known := self._secrets.get(name):
            secret, until = known
            if time.monotonic() < until:
                return secret
            self._secrets.pop(name, None)
        asked_at = time.monotonic()
        rows = await self._fetch(query, name)
        if not rows:
            return None
        secret = KeySecret(**rows[0])
        self._secrets[name] = (secret, asked_at + KEY_CACHE_S)
        return secret

    async def _close(
        self,
        claim: Claim,
        state: JobState,
        result: dict[str, Any] | None,
        failure: dict[str, Any] | None,
        metrics: dict[str, Any],
    ) -> None:
        _held(await self._fetch("close", claim.job_id, claim.token, state.value, result, failure, metrics))

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
        )

    async def _marks(self, endpoint: str) -> list[Place]:
        return [tuple(row) for row in await self._fetch("marks", endpoint)]

    async def _fetch(self, name: str, *args: object) -> list[asyncpg.Record]:
        return await self._outlast(lambda connection: connection.fetch(_SQL[name], *args))

    async def _outlast(self, work: Callable[[asyncpg.Connection], Any]) -> list[asyncpg.Record]:
        """Does `work` on a connection, and again if that breaks or cannot be had. Raises `StoreAway` after `RIDE_OUT_S`."""
        deadline = time.monotonic() + RIDE_OUT_S
        while True:
            try:
                async with self._pool.acquire() as connection:
                    return list(await work(connection))
            except (*_AWAY, asyncpg.InterfaceError, asyncpg.InternalClientError) as exc:
                if not isinstance(exc, _AWAY) and not self._broke_before_use(exc):
                    raise
                if time.monotonic() > deadline:
                    raise StoreAway(str(exc)) from exc
                await asyncio.sleep(0.1)

    def _broke_before_use(self, exc: Exception) -> bool:
        """Whether the connection was just closing when it was taken. asyncpg 0.32 has no class of its own for that: between
        the server's last message and the end of the stream it speaks of its internal state, after it of an interface."""
        return type(exc) in (asyncpg.InterfaceError, asyncpg.InternalClientError) and not self._pool.is_closing()


async def migrate(url: str) -> None:
    """Applies the migrations that this database does not have yet, all or none; who comes at the same time waits.

    Each is remembered by its name, not by a number up to which all are: one that was written beside a later one is applied
    after it where that was there first, so each must do without those that are newer. Raises `ServerTooOld`, changing nothing.
    """
    connection = await asyncpg.connect(url)
    try:
        if (version := connection.get_server_version()).major < OLDEST_SERVER:
            raise ServerTooOld(f"PostgreSQL {version.major} is too old: Reelray needs {OLDEST_SERVER} or newer")
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock($1)", _MIGRATION_LOCK)
            await connection.execute(
                "CREATE TABLE IF NOT EXISTS schema_migrations (name text PRIMARY KEY, applied_at timestamptz DEFAULT now())"
            )
            applied = {row["name"] for row in await connection.fetch("SELECT name FROM schema_migrations")}
            for file in sorted(_RESOURCES.joinpath("migrations").iterdir(), key=lambda file: file.name):
                if file.name.endswith(".sql") and file.name not in applied:
                    await connection.execute(file.read_text())
                    await connection.execute("INSERT INTO schema_migrations (name) VALUES ($1)", file.name)
    finally:
        await connection.close()


async def _use_json(connection: asyncpg.Connection) -> None:
    """Escapes everything beyond ASCII: PostgreSQL stores a lone surrogate or NUL only as its escape."""
    await connection.set_type_codec("json", schema="pg_catalog", encoder=_to_json, decoder=json.loads)


def _to_json(value: object) -> str:
    return value if isinstance(value, _Json) else json.dumps(value, allow_nan=False)


async def _keep_session(connection: asyncpg.Connection) -> None:
    """Instead of asyncpg's round trip of resets after every use: no statement of ours leaves anything in the session."""


def _new_id() -> UUID:
    """A UUIDv7 (RFC 9562, 5.7): 48 bits of milliseconds, 74 of chance. In order of time, so that a commit writes the last page
    of the primary key and not one anywhere in it: with a million jobs 2,300 submits a second instead of 600."""
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
        input=_Json(_to_json(new.input)),
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
    )


def _failure(error: type[ReelrayError]) -> dict[str, Any]:
    return asdict(error_failure(error()))


def _lost_attempt_failures() -> dict[str, dict[str, Any]]:
    return {JobState.CANCELLED: _failure(Cancelled), JobState.FAILED: _failure(RunnerDisconnected)}


def _held(rows: list[asyncpg.Record]) -> list[asyncpg.Record]:
    """The rows that a worker's write touched. Raises `LeaseLost` if there are none."""
    if not rows:
        raise LeaseLost
    return rows


def _storable(text: str) -> str:
    """Text that PostgreSQL takes: without NUL and lone surrogates."""
    return text.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


def _new_secret(key_id: str) -> str:
    return f"{key_id}:{secrets.token_urlsafe(32)}"


def _hash(secret: str) -> bytes:
    """SHA-256 is enough: 256 random bits cannot be guessed, so there is nothing to slow down."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()
