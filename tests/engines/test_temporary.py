import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from engines.temporary import PREFIX, delete_left_folders, temporary_folder


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_killed_processs_folder_is_deleted_and_a_living_ones_stays(temporary: Path):
    code = (
        "import sys; from engines.temporary import temporary_folder\n"
        "with temporary_folder(sys.argv[1]) as folder:\n"
        "    (folder / 'video.mp4').write_bytes(b'x'); print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, temporary]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with temporary_folder() as own:
            (own / "image.png").write_bytes(b"x")
            delete_left_folders()
            assert len(list(temporary.glob("*/*"))) == 2
            other.kill()
            other.wait()
            delete_left_folders()
            assert list(temporary.glob("*/*")) == [own / "image.png"]
    assert not list(temporary.iterdir())


def test_nothing_else_is_deleted(temporary: Path):
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_bytes(b"x")
    (temporary / f"{PREFIX}link").symlink_to(elsewhere)
    (temporary / f"{PREFIX}file").write_bytes(b"x")
    (temporary / f"{PREFIX}just-made").mkdir()
    delete_left_folders()
    assert (elsewhere / "file").exists()
    assert len(list(temporary.iterdir())) == 4
