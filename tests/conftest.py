"""A real PostgreSQL in a temporary folder for the whole session, and a fresh database in it for every test that asks.

Tests of the store also run on a second server, see `tests/deployments/jobs/conftest.py`.
"""

import asyncio
import fcntl
import gc
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import pytest

from deployments.hosting.embedded_postgres import database_url, postgres_folder, stop_embedded
from deployments.hosting.tls import TlsFiles, write_certificate
from deployments.jobs.database import migrate
from deployments.jobs.store import JobStore
from deployments.settings import Settings
from tests.groups import is_slow, turn_of

TEMPLATE = "reelray_test_template"
FREE: dict[str, list[str]] = {}
"""A server's URL -> its databases that tests have left empty."""
SCHEMA = """
SELECT md5(string_agg(line, ',' ORDER BY line)) FROM (
    SELECT concat('column ', relname, ' ', attname, ' ', atttypid::regtype, attisdropped)
    FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid WHERE relnamespace = 'public'::regnamespace AND attnum > 0
    UNION ALL SELECT concat('function ', proname, ' ', prosrc) FROM pg_proc WHERE pronamespace = 'public'::regnamespace
    UNION ALL SELECT concat('trigger ', tgname, ' ', tgenabled) FROM pg_trigger WHERE NOT tgisinternal
    UNION ALL SELECT concat('migration ', name) FROM schema_migrations
    UNION ALL SELECT concat('setting ', setconfig::text)
    FROM pg_db_role_setting JOIN pg_database ON pg_database.oid = setdatabase WHERE datname = current_database()
) AS lines (line)
"""
"""One value for everything in a database that is no row of ours."""
EMPTY = """
SELECT 'SET session_replication_role = replica;'  -- no triggers, no foreign keys
    || (SELECT string_agg(format('DELETE FROM %I', tablename), ';') FROM pg_tables
        WHERE schemaname = 'public' AND tablename <> 'schema_migrations') || ';'
    || (SELECT string_agg(format('SELECT setval(%L, 1, false)', sequencename), ';') FROM pg_sequences WHERE schemaname = 'public')
"""
"""The statements that empty a database. DELETE for the few rows of a test: TRUNCATE makes new files for every table and index."""
END_OTHERS = """
SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()
"""
TEMPLATES: dict[str, tuple[str, str]] = {}
"""A server's URL -> what `SCHEMA` and `EMPTY` give for its template."""

os.environ["COLUMNS"] = "160"  # a worker of pytest-xdist has no terminal whose width tables could take
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several workers share the cores
os.environ.setdefault(
    "GOMP_SPINCOUNT", "1000"
)  # stages that use more threads all the same: see `build_stage`; read when torch loads
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # more are processes that import torch, beside busy workers
# not in the home of the first test that builds a stage, which is deleted after it
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(gettempdir()) / f"reelray-inductor-{os.getuid()}"))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported and collected stays to the end: the garbage collector need never go through these millions of objects."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_itemcollected(item: pytest.Item) -> None:
    """Marks what takes long, and what needs a GPU."""
    if is_slow(item.nodeid):
        item.add_marker(pytest.mark.slow)
    if item.get_closest_marker("gpu"):
        # On a GPU, PyTorch's C++ code warns of other things on every card and in every version: no test of ours depends on it.
        item.add_marker(pytest.mark.filterwarnings("ignore"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Among several workers, what takes longest begins first."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: turn_of(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Groups of tests for the workers, see `groups.py`."""
    from tests.scheduling import GroupScheduling  # late: where pytest-xdist is not installed, nobody asks

    return GroupScheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsFiles]:
    """A certificate of ours. Every client trusts its CA alone: reading all of certifi's took 25 ms a client."""
    files = write_certificate(tmp_path_factory.mktemp("tls"))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SSL_CERT_FILE", str(files.ca))
        environment.setenv("NODE_EXTRA_CA_CERTS", str(files.ca))
        yield files


@pytest.fixture(scope="session")
def embedded_server() -> Iterator[str]:
    """The URL of the embedded server, ready for `database`."""
    with embedded() as settings:
        url = database_url(settings)
        asyncio.run(unsynced(url))
        with template(url):
            yield url


@pytest.fixture(scope="session")
def postgres(embedded_server: str) -> str:
    """The server's URL. Its database `TEMPLATE` is migrated and empty."""
    return embedded_server


@pytest.fixture
async def database(postgres: str) -> AsyncIterator[str]:
    """The URL of a migrated, empty database that is the test's own meanwhile."""
    free = FREE.setdefault(postgres, [])
    if free:
        name = free.pop()
    else:
        name = f"test_{uuid4().hex}"
        await execute(postgres, f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
    yield of_database(postgres, name)
    if await emptied(postgres, name):
        free.append(name)
    else:
        await drop(postgres, name)


@pytest.fixture
async def store(database: str) -> AsyncIterator[JobStore]:
    """An open store on an empty database."""
    opened = await JobStore.open(database)
    yield opened
    await opened.close()


@pytest.fixture(scope="session")
def initialised() -> Iterator[Path]:
    """What the first start of an embedded server leaves: copied in a tenth of the time that it takes."""
    with embedded() as settings:
        database_url(settings)
        stop_embedded(settings)
        yield postgres_folder(settings)


@pytest.fixture
def home(initialised: Path) -> Iterator[Settings]:
    """Settings with a home of their own, whose embedded server has run before and is stopped at the end."""
    with embedded() as settings:
        shutil.copytree(initialised, postgres_folder(settings))
        yield settings


@pytest.fixture(scope="session")
def demo_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of random demo weights, which run faster than the trained, in a home that all workers of a run share."""
    place = tmp_path_factory.getbasetemp()
    settings = Settings(home=(place.parent if "PYTEST_XDIST_WORKER" in os.environ else place) / "shared")
    settings.home.mkdir(exist_ok=True)
    with (settings.home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_random_weights(settings.demo_weights)
    return settings.demo_weights.parent


@pytest.fixture(scope="session")
def demo_settings(tmp_path_factory: pytest.TempPathFactory, demo_weights: Path) -> Settings:
    """Settings whose demo weights are written. One thread: see `tests/engines/conftest.py`."""
    one_thread = {"threads": 1}
    given = {"home": tmp_path_factory.mktemp("home"), "animatediff": one_thread, "controlnext": one_thread}
    settings = Settings.model_validate(given)
    (settings.home / "weights").symlink_to(demo_weights)
    return settings


def write_random_weights(folder: Path) -> None:
    """Both models' random checkpoints. A service whose home has them uses them."""
    from engines.animatediff.demo_weights import write_demo_weights as write_animatediff
    from engines.controlnext.demo_weights import write_demo_weights as write_controlnext

    write_animatediff(folder / "animatediff")
    write_controlnext(folder / "controlnext")


@contextmanager
def embedded(folder: str = "home") -> Iterator[Settings]:
    """Settings with `folder` in a temporary place as their home; stops its server.

    Not in pytest's temporary folder: every session that starts as root closes that to all others, the server's user too.
    """
    with TemporaryDirectory(prefix="reelray-") as place:
        settings = Settings(home=Path(place) / folder)
        try:
            yield settings
        finally:
            stop_embedded(settings)


@contextmanager
def template(url: str) -> Iterator[None]:
    """The database that every test's own is a copy of."""
    asyncio.run(execute(url, f"DROP DATABASE IF EXISTS {TEMPLATE}"))  # of a session that was killed
    asyncio.run(execute(url, f"CREATE DATABASE {TEMPLATE}"))
    asyncio.run(migrate(of_database(url, TEMPLATE)))
    yield
    asyncio.run(execute(url, f"DROP DATABASE {TEMPLATE}"))


async def unsynced(url: str) -> None:
    """What a server of the tests' own writes is not forced to disk: only a crash of the machine could lose it."""
    for setting in ("fsync", "full_page_writes"):
        await execute(url, f"ALTER SYSTEM SET {setting} = off")
    await execute(url, "SELECT pg_reload_conf()")


def of_database(url: str, name: str) -> str:
    """The URL of another database of the same server."""
    return urlsplit(url)._replace(path=f"/{name}").geturl()


async def emptied(server: str, name: str) -> bool:
    """Empties a test's database for the next test: ten times as fast as another copy of the template.

    False if the schema is no longer the template's, or unknown because the test deleted the database.
    """
    if server not in TEMPLATES:
        async with connected(of_database(server, TEMPLATE)) as template:
            TEMPLATES[server] = await template.fetchval(SCHEMA), await template.fetchval(EMPTY)
    schema, empty = TEMPLATES[server]
    try:
        async with connected(of_database(server, name)) as connection:
            while await connection.fetchval(END_OTHERS):  # noqa: ASYNC110  (the server gives no notification)
                await asyncio.sleep(0.002)
            if await connection.fetchval(SCHEMA) != schema:
                return False
            await connection.execute(empty)
            return True
    except asyncpg.PostgresError:
        return False


async def drop(server: str, name: str) -> None:
    """Drops a database. PostgreSQL's FORCE alone sleeps 100 ms where a connection is still ending."""
    end = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = $1"
    async with connected(server) as connection:
        while await connection.fetchval(end, name):  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


async def execute(url: str, statement: str) -> None:
    """Runs one statement on a connection of its own."""
    async with connected(url) as connection:
        await connection.execute(statement)


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close()
