from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from deployments.hosting.embedded_postgres import stop_embedded
from deployments.settings import Settings
from tests.e2e.collector import Collector, collecting
from tests.e2e.service import Service
from tests.e2e.third.added import with_third_endpoint
from tests.wire.conftest import page_client

__all__ = ["page_client"]


def pytest_itemcollected(item: pytest.Item) -> None:
    """Any test may be the one that starts the service, which takes minutes on a machine with other work."""
    item.add_marker(pytest.mark.timeout(400))


@pytest.fixture(scope="package")
def collector() -> Iterator[Collector]:
    """Of the service's spans."""
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="package")
def service(collector: Collector) -> Iterator[Service]:
    """One service for all tests: a start takes half a minute. Not longer: Ray is never quite at rest."""
    with TemporaryDirectory(prefix="reelray-") as home, TemporaryDirectory(prefix="reelray-code-") as code:
        running = Service(
            Path(home),
            {"checkpoint_s": 0.2},
            added={
                "solid": {"frames": 5, "denoise_s": 0.3},
                "telemetry": {"otlp_endpoint": collector.endpoint},
                "scaling": {
                    "solid": {"idle_s": 2, "drain_s": 0.1, "denoise": {"min": 0, "max": 2}},
                    "controlnext": {"denoise": {"min": 2, "max": 2}},
                },
            },
            root=with_third_endpoint(Path(code)),
        )
        try:
            running.start()
            yield running
        finally:
            if running.running:
                assert running.stop() == 0
            stop_embedded(Settings(home=running.home))  # of a test that stopped it
