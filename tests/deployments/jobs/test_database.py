import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator
from importlib.resources import files
from pathlib import Path

import asyncpg
import pytest

from deployments.jobs.database import SQL, ServerTooOld, UnknownSchema, load_statements, migrate
from deployments.jobs.job import NewJob
from deployments.jobs.store import JobStore
from tests.conftest import execute, of_database

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


async def test_stores_that_open_at_once_migrate_once(empty: str) -> None:
    stores = await asyncio.gather(*(JobStore.open(empty) for _ in range(4)))
    job = await stores[0].submit(NEW)
    assert await stores[3].get(job.id)
    connection = await asyncpg.connect(empty)
    applied = await connection.fetch("SELECT name FROM schema_migrations")
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


async def test_an_older_process_leaves_the_functions_of_a_newer_version_alone(empty: str) -> None:
    await migrate(empty)
    await execute(
        empty,
        """
        INSERT INTO schema_migrations (name) VALUES ('9999_newer.sql');
        CREATE OR REPLACE FUNCTION checkpoint_name(job_id uuid) RETURNS text LANGUAGE sql IMMUTABLE AS $$SELECT 'newer'$$;
        """,
    )
    newer = await code(empty)
    await migrate(empty)
    assert await code(empty) == newer


async def test_a_database_from_before_the_first_release_is_refused_and_left_alone(empty: str) -> None:
    await execute(empty, "CREATE TABLE schema_migrations (name text PRIMARY KEY, applied_at timestamptz DEFAULT now())")
    await execute(empty, "INSERT INTO schema_migrations (name) VALUES ('0001_jobs.sql')")
    with pytest.raises(UnknownSchema, match="before Reelray's first release"):
        await JobStore.open(empty)
    assert await code(empty) == {}


async def test_server_older_than_tested_is_refused_and_left_alone(empty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.jobs.database.OLDEST_SERVER", 99)
    with pytest.raises(ServerTooOld, match=r"^PostgreSQL \d\d is too old: Reelray needs 99 or newer$"):
        await JobStore.open(empty)
    connection = await asyncpg.connect(empty)
    assert await connection.fetchval("SELECT to_regclass('schema_migrations')") is None
    await connection.close()


@pytest.mark.parametrize("file", ["queries.sql", "webhooks.sql"])
def test_every_query_is_explained(file: str) -> None:
    assert [name for name, statement in load_statements(file).items() if not statement.startswith("-- ")] == []


@pytest.mark.parametrize(("file", "users"), [("queries.sql", "deployments.jobs"), ("webhooks.sql", "deployments.webhooks")])
def test_every_query_is_used(file: str, users: str) -> None:
    sources = "".join(source.read_text() for source in files(users).iterdir() if source.name.endswith(".py"))
    assert [name for name in load_statements(file) if f'"{name}"' not in sources] == []
