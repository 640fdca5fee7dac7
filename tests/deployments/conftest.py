from pathlib import Path

import pytest

from deployments.demo import write_missing_weights
from deployments.settings import Settings
from deployments.storage import FileStore


@pytest.fixture(scope="session")
def demo_settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings whose demo weights are written."""
    settings = Settings(home=tmp_path_factory.mktemp("home"))
    write_missing_weights(settings)
    return settings


@pytest.fixture
def files(tmp_path: Path) -> FileStore:
    return FileStore(str(tmp_path / "files"))
