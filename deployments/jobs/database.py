"""The PostgreSQL database of the jobs: connections, the statements in `sql/`, what its errors mean, and the schema.

This is the only place that sorts the database's errors, into three kinds:

- *away*: broken connections, a failover, a restart, a full disk, a cancelled statement. The call waits, up to `RIDE_OUT_S`
  seconds, and is repeated, so such a thing only delays callers. After that it raises `StoreAway`.
- *refused*: a wrong password, a newer schema, an unsuitable pooler. Waiting alone does not help; the call raises `StoreRefused`.
- anything else is a bug of ours and is raised as it is.

So every statement and every transaction must be safe to run twice.
"""

import asyncio
import hashlib
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from importlib.resources import files
from typing import Any, Self, TypeVar

import asyncpg

from deployments.jobs.listener import Changes, Listener

T = TypeVar("T")

RIDE_OUT_S = 10.0
"""How long a call waits for a database that is away; a killed embedded server is back within two seconds."""
OUTAGE_PAUSE_S = 1.0
"""How long to pause after a call that failed, before the next one."""
CONNECT_S = 10.0
OLDEST_SERVER = 15
"""The oldest major version of PostgreSQL that the store's tests run on. Older ones might work; nobody has tried."""
CONNECTIONS = 8

# https://www.postgresql.org/docs/current/errcodes-appendix.html
_AWAY = (
    "08",  # connections
    "25006",  # read-only: connected to the old primary after a failover
    "25P",  # ended by the server's time limits for transactions
    "40001",  # serialization failure
    "40P01",  # deadlock
    "53",  # disk full, out of memory, too many connections
    "55P03",  # lock_timeout
    "57",  # shutdown, crash, statement_timeout
    "58",  # a file of the server could not be read or written
)
_REFUSED = ("28", "3D", "42501")  # wrong password or user, no such database, no such privilege
_LOST_STATEMENT = ("26000", "42P05")  # a statement that another session has prepared
_TRANSACTION_POOLER = (
    "a pooler gives every transaction another session of the database, and LISTEN needs one of its own: set PgBouncer's pool_mode"
    " to session for this user or database, or connect to PostgreSQL directly"
)
_MIGRATION_LOCK = 0x7265656C
_WITH_TRIGGERS = ("jobs", "job_logs", "webhook_outbox")
_TRIGGERS = """
SELECT tgname FROM pg_trigger JOIN pg_class ON pg_class.oid = tgrelid
WHERE relname = ANY ($1::text[]) AND pg_table_is_visible(tgrelid)
"""
# Every statement of ours is written to read by an index, whatever is in the tables. So it is planned once, and never as a scan
# because the tables were small or unvacuumed at that moment. Planned at every call, a status read took 300 µs of the database's
# time instead of 80. They are no startup parameters, because PgBouncer refuses those.
_SESSION = "SET plan_cache_mode = force_generic_plan; SET enable_seqscan = off; SET random_page_cost = 1.1; SET jit = off"
SQL = files("deployments.jobs").joinpath("sql")


def statements(text: str) -> dict[str, str]:
    """Name -> statement of a text in which every statement follows its `-- name:` line."""
    _, *parts = re.split(r"^-- name: (\w+)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def load_statements(file: str) -> dict[str, str]:
    """The same of a file in `sql/`."""
    return statements(SQL.joinpath(file).read_text())


QUERIES = load_statements("queries.sql")
"""Every statement of the job store, by name."""


logger = logging.getLogger(__name__)


class StoreAway(Exception):
    """The database cannot be used now, and could not be for `RIDE_OUT_S` seconds."""


class StoreRefused(StoreAway):
    """The database cannot be used until its operator changes something; the message says what."""


class Json(str):
    """Text that is JSON already and is stored as it is."""


class Database:
    """A pool of connections, and one more that listens. Make it with `open`; it belongs to one event loop."""

    def __init__(self, pool: asyncpg.Pool, listener: Listener) -> None:
        self._pool = pool
        self._listener = listener

    @classmethod
    async def open(cls, url: str, *, max_connections: int = CONNECTIONS, upgrades: bool = False) -> Self:
        """Connects, checks the schema and listens, with `max_connections` and one more.

        An empty database gets the schema. One with an older schema is refused, or with `upgrades` it is brought up to date.
        Raises `StoreAway`, `StoreRefused`.
        """
        return await _riding_out(lambda: cls._open(url, max_connections, upgrades), RIDE_OUT_S)

    @classmethod
    async def _open(cls, url: str, max_connections: int, upgrades: bool) -> Self:
        if not await _has_current_schema(url, upgrades):
            await _migrate(url)
        pool = await asyncpg.create_pool(
            url,
            min_size=1,
            max_size=max_connections,
            init=_prepare_session,
            reset=_keep_session,
            timeout=CONNECT_S,
            command_timeout=60,
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

    async def fetch(self, statement: str, *args: object) -> list[asyncpg.Record]:
        """The rows of one statement. Raises `StoreAway`."""
        return await self.run(lambda connection: connection.fetch(statement, *args))

    async def run(self, work: Callable[[asyncpg.Connection], Any], *, ride_out_s: float | None = None) -> list[asyncpg.Record]:
        """Does `work` on a connection, and again while the database is away. Raises `StoreAway` after `ride_out_s`."""
        patience_s = RIDE_OUT_S if ride_out_s is None else ride_out_s
        return await _riding_out(lambda: self._run(work, patience_s), patience_s)

    async def _run(self, work: Callable[[asyncpg.Connection], Any], patience_s: float) -> list[asyncpg.Record]:
        async with self._pool.acquire(timeout=max(1.0, patience_s)) as connection:
            try:
                with _end_as_os_error(connection):
                    return list(await work(connection))
            except asyncpg.ReadOnlySQLTransactionError:
                await self._pool.expire_connections()  # the URL may lead to another server by now
                raise

    async def check(self) -> None:
        """Raises `StoreAway` unless the database answers and is not read-only."""

        async def look(connection: asyncpg.Connection) -> list[asyncpg.Record]:
            if await connection.fetchval("SELECT current_setting('transaction_read_only')::boolean"):
                raise asyncpg.ReadOnlySQLTransactionError("the database is read-only")
            return []

        await self.run(look, ride_out_s=0.0)

    def watch(self, *subjects: str) -> AbstractContextManager[Changes]:
        """Hears every notification about any of the subjects from now on; `listener.py` has them."""
        return self._listener.subscribed(*subjects)


def _outage(exc: Exception) -> StoreAway | None:
    """What an error means; None: it is a bug of ours."""
    if isinstance(exc, StoreAway):
        return exc
    text = str(exc.args[-1]) if exc.args else ""  # OSError: number, then text
    state = (exc.sqlstate or "") if isinstance(exc, asyncpg.PostgresError) else ""
    if state in _LOST_STATEMENT:
        return StoreRefused(_TRANSACTION_POOLER)
    if state.startswith("08") and "startup parameter" in text:
        return StoreRefused(f"{text}: leave it out of the database's URL, or add it to PgBouncer's ignore_startup_parameters")
    if state.startswith(_REFUSED) or isinstance(exc, asyncpg.ClientConfigurationError):
        return StoreRefused(text)
    # asyncpg 0.32 raises InternalClientError where it reads between the server's last message and the end of the stream
    if state.startswith(_AWAY) or isinstance(exc, OSError | asyncpg.InternalClientError):
        return StoreAway(f"{type(exc).__name__}: {text}")
    return None


@contextmanager
def _end_as_os_error(connection: asyncpg.Connection) -> Iterator[None]:
    """asyncpg reports the use of a connection that has just ended as it does mistakes of ours."""
    try:
        yield
    except asyncpg.InterfaceError as exc:
        if connection.is_closed():
            raise ConnectionResetError(str(exc)) from exc
        raise


@asynccontextmanager
async def _connected(url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(url, timeout=CONNECT_S)
    try:
        with _end_as_os_error(connection):
            yield connection
    finally:
        await connection.close()


async def _riding_out(call: Callable[[], Awaitable[T]], patience_s: float) -> T:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return await call()
        except Exception as exc:
            outage = _outage(exc)
            if outage is None:
                raise
            if isinstance(outage, StoreRefused) or time.monotonic() >= deadline:
                raise outage from (None if outage is exc else exc)
        await asyncio.sleep(0.1)


async def patiently(call: Callable[[], Awaitable[T]]) -> T:
    """The call's answer, however long the database is away."""
    while True:
        try:
            return await call()
        except StoreAway:
            logger.exception("the database is away; the call is repeated", extra={"action": "outage"})
            await asyncio.sleep(OUTAGE_PAUSE_S)


async def migrate(url: str) -> None:
    """Brings the schema up to date in one transaction; processes that come at the same time wait.

    It applies the migrations that this database does not have yet. Each is remembered by its name, so one that was written beside
    a later one is also applied where the later one was first, and must not rely on it. Then it applies the current functions and
    makes the triggers that are missing.

    Raises `StoreAway`, `StoreRefused`, and has then changed nothing.
    """
    await _riding_out(lambda: _migrate(url), RIDE_OUT_S)


async def _migrate(url: str) -> None:
    async with _connected(url) as connection:
        _refuse_old_server(connection)
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock($1)", _MIGRATION_LOCK)
            await connection.execute(
                "CREATE TABLE IF NOT EXISTS schema_migrations (name text PRIMARY KEY, applied_at timestamptz DEFAULT now())"
            )
            missing = await _missing(connection)
            for name, script in _migrations().items():
                if name in missing:
                    await connection.execute(script)
                    await connection.execute("INSERT INTO schema_migrations (name) VALUES ($1)", name)
            await connection.execute(SQL.joinpath("functions.sql").read_text())
            made = {row["tgname"] for row in await connection.fetch(_TRIGGERS, _WITH_TRIGGERS)}
            for name, statement in load_statements("triggers.sql").items():
                if name not in made:
                    await connection.execute(statement)
            await connection.execute("DELETE FROM schema_migrations WHERE name NOT LIKE '%.sql'")
            await connection.execute("INSERT INTO schema_migrations (name) VALUES ($1)", _code_name())


async def _has_current_schema(url: str, upgrades: bool) -> bool:
    """Whether the database has this version's schema. False: it may be migrated. Raises `StoreRefused`."""
    async with _connected(url) as connection:
        _refuse_old_server(connection)
        await _refuse_transaction_pooler(connection, url)
        if await connection.fetchval("SELECT to_regclass('schema_migrations')") is None:
            return False
        missing = await _missing(connection)
    if missing and not upgrades:
        raise StoreRefused("the database has another version's schema: run `reelray database migrate` of this version")
    return not missing


def _refuse_old_server(connection: asyncpg.Connection) -> None:
    if (version := connection.get_server_version()).major < OLDEST_SERVER:
        raise StoreRefused(f"PostgreSQL {version.major} is too old: Reelray needs {OLDEST_SERVER} or newer")


async def _refuse_transaction_pooler(connection: asyncpg.Connection, url: str) -> None:
    """A pooler tells its clients another pid than the server process has. With one session for each client, two clients have a
    process each, at any time; a pooler in transaction mode mostly gives both the process that was used last."""

    async def pid(client: asyncpg.Connection) -> int:
        found: int = await client.fetchval("SELECT pg_backend_pid()")
        return found

    if await pid(connection) == connection.get_server_pid():
        return
    async with _connected(url) as other:
        pairs = {(await pid(connection), await pid(other)) for _ in range(5)}
    if len(pairs) > 1 or any(one == another for one, another in pairs):
        raise StoreRefused(_TRANSACTION_POOLER)


async def _missing(connection: asyncpg.Connection) -> set[str]:
    """The names of what a database's schema lacks. Raises `StoreRefused` for a schema that this version does not know."""
    applied = {row["name"] for row in await connection.fetch("SELECT name FROM schema_migrations")}
    migrations = _migrations()
    if applied and next(iter(migrations)) not in applied:
        raise StoreRefused(
            "this database was made before Reelray's first release and cannot be converted: use an empty one"
            " (for the embedded database delete the folder postgres in the service's home)"
        )
    if newer := sorted(name for name in applied - migrations.keys() if name.endswith(".sql")):
        raise StoreRefused(f"the database belongs to a newer Reelray, with {', '.join(newer)}: use that version")
    return {*migrations, _code_name()} - applied


def _code_name() -> str:
    """A name that changes with the functions and triggers."""
    code = "".join(SQL.joinpath(file).read_text() for file in ("functions.sql", "triggers.sql"))
    return f"functions {hashlib.sha256(code.encode()).hexdigest()[:16]}"


def _migrations() -> dict[str, str]:
    """File name -> script, in the order of their numbers."""
    scripts = {file.name: file.read_text() for file in SQL.joinpath("migrations").iterdir() if file.name.endswith(".sql")}
    return dict(sorted(scripts.items()))


async def _prepare_session(connection: asyncpg.Connection) -> None:
    """Escapes everything beyond ASCII in JSON: PostgreSQL stores a lone surrogate or NUL only as its escape."""
    await connection.execute(_SESSION)
    await connection.set_type_codec("json", schema="pg_catalog", encoder=to_json, decoder=json.loads)


def to_json(value: object) -> Json:
    """The JSON of a value; a `Json` is returned as it is."""
    return value if isinstance(value, Json) else Json(json.dumps(value, allow_nan=False))


def storable(text: str) -> str:
    """Text that PostgreSQL takes: without NUL and lone surrogates."""
    return text.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


async def _keep_session(connection: asyncpg.Connection) -> None:
    """Replaces asyncpg's round trip of resets after every use: no statement of ours leaves anything in the session."""
