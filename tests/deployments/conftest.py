from pathlib import Path

import pytest

from deployments.files.file_store import FileStore


@pytest.fixture
def files(tmp_path: Path) -> FileStore:
    return FileStore(str(tmp_path / "files"))
