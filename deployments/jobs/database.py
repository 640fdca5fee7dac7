"""The PostgreSQL database of the jobs: connections, the statements in `sql/`, outages, and the schema.

A call that finds the database away waits for it, up to `RIDE_OUT_S` seconds, and is repeated: a restart of the database only
delays callers. So every statement and every transaction must be safe to run twice.
"""

import asyncio
import json
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.resources import files
from typing import Any, Self

import asyncpg

from deployments.jobs.listener import Changes, Listener

RIDE_OUT_S = 10.0
"""How long a call waits for a database that is away; a killed embedded server is back within two seconds."""
OLDEST_SERVER = 15
"""The oldest major version of PostgreSQL that the store's tests run on. Older ones might work; nobody has tried."""
CONNECTIONS = 8

_AWAY = (
    OSError,
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
    asyncpg.TooManyConnectionsError,
)
"""The errors that mean the database is away. All others are raised to the caller at once."""
_MIGRATION_LOCK = 0x7265656C
_WITH_TRIGGERS = ("jobs", "job_logs", "webhook_outbox")
_TRIGGERS = """
SELECT tgname FROM pg_trigger JOIN pg_class ON pg_class.oid = tgrelid
WHERE relname = ANY ($1::text[]) AND pg_table_is_visible(tgrelid)
"""
_SESSION = {
    # Every statement of ours is written to read by an index, whatever is in the tables. So it is planned once, and never as a
    # scan because the tables were small or unvacuumed at that moment. Planned at every call, a status read took 300 µs of the
    # database's time instead of 80.
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "random_page_cost": "1.1",
    "jit": "off",
}
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


class StoreAway(Exception):
    """The database cannot be reached, and has not been for `RIDE_OUT_S` seconds."""


class ServerTooOld(RuntimeError):
    """The database server is older than the ones that the tests run on."""


class UnknownSchema(RuntimeError):
    """The database has tables of a Reelray from before its first release."""


class Json(str):
    """Text that is JSON already and is stored as it is."""


class Database:
    """A pool of connections, and one more that listens. Make it with `open`; it belongs to one event loop."""

    def __init__(self, pool: asyncpg.Pool, listener: Listener) -> None:
        self._pool = pool
        self._listener = listener

    @classmethod
    async def open(cls, url: str, *, max_connections: int = CONNECTIONS) -> Self:
        """Connects, brings the schema up to date and listens, with `max_connections` and one more.

        Raises `StoreAway` as calls do, `ServerTooOld`, `UnknownSchema`.
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

    async def fetch(self, statement: str, *args: object) -> list[asyncpg.Record]:
        """The rows of one statement. Raises `StoreAway`."""
        return await self.run(lambda connection: connection.fetch(statement, *args))

    async def run(self, work: Callable[[asyncpg.Connection], Any]) -> list[asyncpg.Record]:
        """Does `work` on a connection, and again if that breaks or there is none. Raises `StoreAway` after `RIDE_OUT_S`."""
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

    def watch(self, *subjects: str) -> AbstractContextManager[Changes]:
        """Hears every notification about any of the subjects from now on; `listener.py` has them."""
        return self._listener.subscribed(*subjects)

    def _broke_before_use(self, exc: Exception) -> bool:
        """Whether the connection was just closing when it was taken from the pool. asyncpg 0.32 has no error of its own for that:
        it raises `InternalClientError` between the server's last message and the end of the stream, `InterfaceError` after it."""
        return type(exc) in (asyncpg.InterfaceError, asyncpg.InternalClientError) and not self._pool.is_closing()


async def migrate(url: str) -> None:
    """Brings the schema up to date in one transaction; processes that come at the same time wait.

    It applies the migrations that this database does not have yet. Each is remembered by its name, so one that was written beside
    a later one is also applied where the later one was first, and must not rely on it. Then it applies the current functions and
    makes the triggers that are missing. A database with migrations that this version does not know belongs to a newer version:
    its functions and triggers are left alone.

    Raises `ServerTooOld` or `UnknownSchema`, and has then changed nothing.
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
            migrations = _migrations()
            if applied and next(iter(migrations)) not in applied:
                raise UnknownSchema(
                    "this database was made before Reelray's first release and cannot be converted: use an empty one"
                    " (for the embedded database delete the folder postgres in the service's home)"
                )
            for name, script in migrations.items():
                if name not in applied:
                    await connection.execute(script)
                    await connection.execute("INSERT INTO schema_migrations (name) VALUES ($1)", name)
            if applied <= migrations.keys():
                await connection.execute(SQL.joinpath("functions.sql").read_text())
                await _make_missing_triggers(connection)
    finally:
        await connection.close()


def _migrations() -> dict[str, str]:
    """File name -> script, in the order of their numbers."""
    scripts = {file.name: file.read_text() for file in SQL.joinpath("migrations").iterdir() if file.name.endswith(".sql")}
    return dict(sorted(scripts.items()))


async def _make_missing_triggers(connection: asyncpg.Connection) -> None:
    made = {row["tgname"] for row in await connection.fetch(_TRIGGERS, _WITH_TRIGGERS)}
    for name, statement in load_statements("triggers.sql").items():
        if name not in made:
            await connection.execute(statement)


async def _use_json(connection: asyncpg.Connection) -> None:
    """Escapes everything beyond ASCII: PostgreSQL stores a lone surrogate or NUL only as its escape."""
    await connection.set_type_codec("json", schema="pg_catalog", encoder=to_json, decoder=json.loads)


def to_json(value: object) -> Json:
    """The JSON of a value; a `Json` is returned as it is."""
    return value if isinstance(value, Json) else Json(json.dumps(value, allow_nan=False))


def storable(text: str) -> str:
    """Text that PostgreSQL takes: without NUL and lone surrogates."""
    return text.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


async def _keep_session(connection: asyncpg.Connection) -> None:
    """Replaces asyncpg's round trip of resets after every use: no statement of ours leaves anything in the session."""
