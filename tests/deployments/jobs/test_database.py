import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from importlib.resources import files
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import asyncpg
import pytest

from deployments.jobs.database import SQL, StoreAway, StoreRefused, load_statements, migrate
from deployments.jobs.job import NewJob
from deployments.jobs.store import JobStore
from tests.conftest import drop, execute, of_database
from tests.deployments.jobs.pooler import PGBOUNCER, pgbouncer, pooling
from tests.patience import PATIENCE_S

NEW = NewJob("fal-ai/fake", {"prompt": "a cat"})
CODE = """
SELECT 'function ' || proname, md5(prosrc) FROM pg_proc WHERE pronamespace = 'public'::regnamespace
UNION ALL
SELECT 'trigger ' || tgname || ' on ' || tgrelid::regclass, tgenabled::text FROM pg_trigger WHERE NOT tgisinternal
"""


@pytest.fixture
async def empty(postgres: str) -> AsyncIterator[str]:
    """The URL of a database without our schema."""
    await execute(postgres, "CREATE DATABASE empty")
    yield of_database(postgres, "empty")
    await execute(postgres, "DROP DATABASE empty WITH (FORCE)")


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of `sql/`, without migrations, functions and triggers."""
    (tmp_path / "migrations").mkdir()
    (tmp_path / "functions.sql").write_text("SELECT")
    (tmp_path / "triggers.sql").touch()
    monkeypatch.setattr("deployments.jobs.database.SQL", tmp_path)
    return tmp_path


async def code(url: str) -> dict[str, str]:
    """All our functions and triggers in a database, with a hash of each function or a trigger's state."""
    connection = await asyncpg.connect(url)
    rows = await connection.fetch(CODE)
    await connection.close()
    return dict(rows)


async def test_a_url_without_parts_takes_the_server_from_the_environment(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the YAML of a cluster holds no password."""
    parts = urlsplit(database)
    at = {"host": parts.hostname, "port": parts.port, **dict(parse_qsl(parts.query))}
    at |= {"user": parts.username, "password": parts.password or "", "database": parts.path[1:]}
    for name, value in at.items():
        monkeypatch.setenv(f"PG{name.upper()}", str(value))
    store = await JobStore.open("postgresql://")
    job = await store.submit(NEW)
    await store.close()
    connection = await asyncpg.connect(database)
    assert await connection.fetchval("SELECT id FROM jobs") == job.id
    await connection.close()


async def test_stores_that_open_at_once_migrate_once(empty: str) -> None:
    stores = await asyncio.gather(*(JobStore.open(empty) for _ in range(4)))
    job = await stores[0].submit(NEW)
    assert await stores[3].get(job.id)
    connection = await asyncpg.connect(empty)
    applied = await connection.fetch("SELECT name FROM schema_migrations WHERE name LIKE '%.sql'")
    await connection.close()
    names = [file.name for file in SQL.joinpath("migrations").iterdir() if file.name.endswith(".sql")]
    assert sorted(row["name"] for row in applied) == sorted(names)
    for opened in stores:
        await opened.close()


async def test_migration_that_was_written_beside_a_later_one_is_applied_after_it(empty: str, scripts: Path) -> None:
    migrations = scripts / "migrations"
    (migrations / "0001_a.sql").write_text("CREATE TABLE a ()")
    (migrations / "0003_c.sql").write_text("ALTER TABLE a ADD c integer")
    await migrate(empty)
    (migrations / "0002_b.sql").write_text("ALTER TABLE a ADD b integer")
    await migrate(empty)
    await execute(empty, "SELECT b, c FROM a")


def test_every_migration_has_a_number_of_its_own() -> None:
    names = [file.name for file in SQL.joinpath("migrations").iterdir()]
    assert [name for name in names if not re.fullmatch(r"\d{4}_\w+\.sql", name)] == []
    assert [number for number, count in Counter(name[:4] for name in names).items() if count > 1] == []


async def test_functions_and_triggers_are_the_current_ones_after_every_migrate(empty: str) -> None:
    await migrate(empty)
    current = await code(empty)
    await execute(
        empty,
        """
        CREATE OR REPLACE FUNCTION checkpoint_name(job_id uuid) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT NULL::text';
        DROP TRIGGER next_line ON job_logs;
        DROP FUNCTION job_logs_next;
        """,
    )
    assert await code(empty) != current
    await migrate(empty)
    assert await code(empty) == current


async def test_the_triggers_of_another_applications_tables_are_not_taken_for_ours(empty: str) -> None:
    await execute(
        empty,
        """
        CREATE TABLE theirs ();
        CREATE TRIGGER next_line BEFORE UPDATE ON theirs
            FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger();
        """,
    )
    await migrate(empty)
    assert {"trigger next_line on theirs", "trigger next_line on job_logs"} < (await code(empty)).keys()


async def test_a_database_of_a_newer_version_is_refused_and_left_alone(empty: str) -> None:
    await migrate(empty)
    await execute(
        empty,
        """
        INSERT INTO schema_migrations (name) VALUES ('9999_newer.sql');
        CREATE OR REPLACE FUNCTION checkpoint_name(job_id uuid) RETURNS text LANGUAGE sql IMMUTABLE AS $$SELECT 'newer'$$;
        """,
    )
    newer = await code(empty)
    for use in (JobStore.open(empty), JobStore.open(empty, upgrades=True), migrate(empty)):
        with pytest.raises(StoreRefused, match=r"newer Reelray, with 9999_newer\.sql"):
            await use
    assert await code(empty) == newer


@pytest.mark.parametrize("file", ["migrations/0002_b.sql", "functions.sql"])
async def test_only_migrate_and_the_embedded_default_change_the_schema_of_a_database(
    empty: str, scripts: Path, file: str
) -> None:
    (scripts / "migrations" / "0001_a.sql").write_text("CREATE TABLE a ()")
    await (await JobStore.open(empty)).close()  # an empty database gets the schema
    (scripts / file).write_text("CREATE TABLE b ()")
    with pytest.raises(StoreRefused, match="run `reelray database migrate`"):
        await JobStore.open(empty)
    await (await JobStore.open(empty, upgrades=True)).close()
    await execute(empty, "SELECT FROM b")
    (scripts / file).write_text("CREATE TABLE IF NOT EXISTS b ()")
    await migrate(empty)
    await (await JobStore.open(empty)).close()


async def test_a_database_from_before_the_first_release_is_refused_and_left_alone(empty: str) -> None:
    await execute(empty, "CREATE TABLE schema_migrations (name text PRIMARY KEY, applied_at timestamptz DEFAULT now())")
    await execute(empty, "INSERT INTO schema_migrations (name) VALUES ('0001_jobs.sql')")
    with pytest.raises(StoreRefused, match="before Reelray's first release"):
        await JobStore.open(empty)
    assert await code(empty) == {}


async def test_server_older_than_tested_is_refused_and_left_alone(empty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.jobs.database.OLDEST_SERVER", 99)
    with pytest.raises(StoreRefused, match=r"^PostgreSQL \d\d is too old: Reelray needs 99 or newer$"):
        await JobStore.open(empty)
    connection = await asyncpg.connect(empty)
    assert await connection.fetchval("SELECT to_regclass('schema_migrations')") is None
    await connection.close()


# What an error means.


async def test_errors_are_away_refused_or_our_own(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.jobs.database.RIDE_OUT_S", 0.0)
    kinds = {
        StoreAway: "08006 25006 25P03 40001 40P01 53100 53200 53300 55P03 57014 57P01 57P03 58030",
        StoreRefused: "28P01 28000 3D000 42501 26000",
        asyncpg.PostgresError: "22003 23505 42P01 42703 P0001 XX000",
    }
    for kind, states in kinds.items():
        for state in states.split():
            with pytest.raises(kind) as raised:
                await store.database.fetch(f"DO $$ BEGIN RAISE SQLSTATE '{state}'; END $$")
            assert raised.type is kind or kind is asyncpg.PostgresError, state


async def test_a_mistake_of_ours_is_raised_at_once(store: JobStore) -> None:
    calls = 0

    async def mistaken(connection: asyncpg.Connection) -> list[asyncpg.Record]:
        nonlocal calls
        calls += 1
        return list(await connection.fetch("SELECT $1::text"))

    with pytest.raises(asyncpg.InterfaceError):
        await store.database.run(mistaken)
    assert calls == 1


async def test_a_call_does_not_wait_for_ever_for_a_free_connection(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.jobs.database.RIDE_OUT_S", 0.05)
    store = await JobStore.open(database, max_connections=1)
    held = asyncio.Event()

    async def hold(_: asyncpg.Connection) -> list[asyncpg.Record]:
        held.set()
        return await asyncio.Event().wait() and []

    busy = asyncio.create_task(store.database.run(hold))
    await held.wait()
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(StoreAway):
            await store.queued("fal-ai/fake")
    busy.cancel()
    await asyncio.wait([busy])
    await store.close()


async def test_a_failover_only_delays_a_submission(store: JobStore, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server of the old connections stays read-only, as the old primary does; a new connection leads to the new one."""
    name = urlsplit(database).path[1:]
    await execute(database, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    ours = "pid <> pg_backend_pid() AND datname = current_database()"
    await execute(database, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {ours}")
    told = ""
    async with asyncio.timeout(PATIENCE_S):
        while "read-only" not in told:  # a connection that has just been ended gives another message
            with pytest.raises(StoreAway) as away:
                await store.check()
            told = str(away.value)
    monkeypatch.setattr("deployments.jobs.database.RIDE_OUT_S", PATIENCE_S)
    submitting = asyncio.create_task(store.submit(NEW))
    await asyncio.sleep(0.3)
    assert not submitting.done()
    await execute(database, f"BEGIN READ WRITE; ALTER DATABASE {name} RESET ALL; COMMIT")
    job = await submitting
    assert await store.get(job.id)
    await store.check()


@pytest.mark.parametrize(
    "pooling",
    [
        pooling,
        pytest.param(pgbouncer, marks=pytest.mark.skipif(PGBOUNCER is None, reason="PgBouncer itself was not tried")),
    ],
)
async def test_a_pooler_in_session_mode_works_and_one_in_transaction_mode_says_what_to_do(
    embedded_server: str, pooling: Callable[..., AbstractAsyncContextManager[str]]
) -> None:
    await execute(embedded_server, "CREATE DATABASE pooled")
    url = of_database(embedded_server, "pooled")
    async with pooling(url, shared=False) as pooled:
        store = await JobStore.open(pooled)
        async with store.claims.watch_work() as work:
            job = await store.submit(NEW)
            assert await work.changed(5)
        assert await store.get(job.id)
        await store.close()
        with pytest.raises(StoreRefused, match="ignore_startup_parameters"):
            await JobStore.open(f"{pooled}&jit=off")
    async with pooling(url, shared=True) as pooled:
        with pytest.raises(StoreRefused, match="pool_mode to session"):
            await JobStore.open(pooled)
    await drop(embedded_server, "pooled")


@pytest.mark.parametrize("file", ["queries.sql", "webhooks.sql"])
def test_every_query_is_explained(file: str) -> None:
    assert [name for name, statement in load_statements(file).items() if not statement.startswith("-- ")] == []


@pytest.mark.parametrize(("file", "users"), [("queries.sql", "deployments.jobs"), ("webhooks.sql", "deployments.webhooks")])
def test_every_query_is_used(file: str, users: str) -> None:
    sources = "".join(source.read_text() for source in files(users).iterdir() if source.name.endswith(".py"))
    assert [name for name in load_statements(file) if f'"{name}"' not in sources] == []
