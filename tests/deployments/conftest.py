from pathlib import Path

import pytest

from deployments.storage import FileStore


@pytest.fixture
def files(tmp_path: Path) -> FileStore:
    return FileStore(str(tmp_path / "files"))
