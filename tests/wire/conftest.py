"""The wire suite runs against the app under uvicorn in this process, `reelray gateway --workers 2` and Serve behind HAProxy. The
last two speak https only.

A test that looks into the process, because it asks for one of `INSIDE`, has the first only.
"""

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from deployments.files.file_store import FileStore
from deployments.hosting.tls import TlsFiles
from deployments.ingress.app import create_app
from deployments.jobs.store import JobStore
from deployments.settings import Settings
from tests.conftest import TEMPLATE, execute, of_database
from tests.wire.hosting import Hosted, hosted
from tests.wire.page import PageClient, install_client
from tests.wire.service import Wire, listening

HOSTINGS = ("uvicorn", "gateway", "serve")
INSIDE = {"wire", "settings"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "hosting" in metafunc.fixturenames:
        inside = INSIDE & inspect.signature(metafunc.function).parameters.keys()
        metafunc.parametrize("hosting", HOSTINGS[:1] if inside else HOSTINGS, scope="package")


@pytest.fixture(scope="package")
def host(hosting: str, postgres: str, tls: TlsFiles) -> Iterator[Hosted | None]:
    """None is this process."""
    if hosting == "uvicorn":
        yield None
        return
    name = f"hosted_{uuid4().hex}"
    asyncio.run(execute(postgres, f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}"))
    with hosted(hosting, of_database(postgres, name), tls) as service:
        yield service
    asyncio.run(execute(postgres, f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture(scope="session")
def page_client() -> Callable[[str], PageClient]:
    """Makes fal's endpoint page for a base URL."""
    install_client()
    return PageClient


@pytest.fixture
def settings(host: Hosted | None, tmp_path: Path) -> Settings:
    return Settings(home=tmp_path) if host is None else host.settings


@pytest.fixture
async def store(host: Hosted | None, database: str) -> AsyncIterator[JobStore]:
    """The store of the service under test, empty."""
    opened = await JobStore.open(database if host is None else host.settings.database)
    yield opened
    await opened.close()
    if host is not None:
        await execute(host.settings.database, "TRUNCATE jobs CASCADE")


@pytest.fixture
def wire(settings: Settings, store: JobStore) -> Wire:
    return Wire(create_app(settings, store))


@pytest.fixture
def files(settings: Settings) -> FileStore:
    return FileStore(settings.files_url)


@pytest.fixture
async def base_url(host: Hosted | None, wire: Wire) -> AsyncIterator[str]:
    if host is not None:
        yield host.url
        return
    async with listening(wire) as url:
        yield url


@pytest.fixture
def page(base_url: str, page_client: Callable[[str], PageClient]) -> PageClient:
    return page_client(base_url)
