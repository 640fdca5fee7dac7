import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from deployments.settings import Settings
from tests.conftest import embedded
from tests.e2e.service import Service
from tests.wire.conftest import page_client

__all__ = ["page_client"]


@pytest.fixture(scope="package")
def service() -> Iterator[Service]:
    """One service for all tests that leave it as they found it. Not longer: Ray is never quite at rest."""
    with TemporaryDirectory(prefix="reelray-") as home:
        running = Service(Path(home))
        running.start()
        yield running
        assert running.stop() == 0


@pytest.fixture(scope="package")
def settings(demo_settings: Settings) -> Iterator[Settings]:
    """Of `own_service`. Its weights are there: who starts one without any is `service`."""
    with embedded() as settings:
        shutil.copytree(demo_settings.demo_weights, settings.demo_weights)
        yield settings


@pytest.fixture(scope="package")
def own_service(settings: Settings) -> Iterator[Service]:
    """One for all tests that stop it, kill it or let it hang, and leave it running: a start takes half a minute."""
    queue = {"checkpoint_s": 0.2, "lease_s": 3, "max_in_flight": 1}
    running = Service(settings.home, queue=queue, without=("controlnext",), import_path="tests.e2e.endless:build")
    running.start()
    yield running
    assert running.stop() == 0
