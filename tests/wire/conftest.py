from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from deployments.ingress import create_app
from deployments.jobs.store import JobStore
from deployments.settings import Settings
from deployments.storage import FileStore
from tests.wire.page import PageClient, install_client
from tests.wire.service import Wire, listening


@pytest.fixture(scope="session")
def page_client() -> Callable[[str], PageClient]:
    """Makes fal's endpoint page for a base URL."""
    install_client()
    return PageClient


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path)


@pytest.fixture
def wire(settings: Settings, store: JobStore) -> Wire:
    return Wire(create_app(settings, store))


@pytest.fixture
def files(settings: Settings) -> FileStore:
    return FileStore(settings.files_url)


@pytest.fixture
async def base_url(wire: Wire) -> AsyncIterator[str]:
    async with listening(wire) as url:
        yield url


@pytest.fixture
def page(base_url: str, page_client: Callable[[str], PageClient]) -> PageClient:
    return page_client(base_url)
