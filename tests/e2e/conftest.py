from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.e2e.service import Service
from tests.wire.conftest import page_client

__all__ = ["page_client"]


@pytest.fixture(scope="session")
def service() -> Iterator[Service]:
    """One service for all tests that leave it as they found it."""
    with TemporaryDirectory(prefix="reelray-") as home:
        running = Service(Path(home))
        running.start()
        yield running
        assert running.stop() == 0
