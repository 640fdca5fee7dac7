import os
import re
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem

from deployments.storage import CHUNK_BYTES, FileStore, StoredFile


@pytest.fixture(params=["folder", "file://", "memory://"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> FileStore:
    urls = {"folder": str(tmp_path / "files"), "file://": f"file://{tmp_path}/files", "memory://": f"memory://{tmp_path}"}
    return FileStore(urls[request.param])


def name_of(stored: StoredFile) -> str:
    return stored.path.removeprefix("/files/")


async def read(files: FileStore, stored: StoredFile, start: int, stop: int) -> bytes:
    return b"".join([chunk async for chunk in files.read(name_of(stored), start, stop)])


async def test_bytes_come_back_as_they_were_put(files: FileStore) -> None:
    stored = await files.put("video.mp4", b"0123456789", "video/mp4")
    assert stored.size == 10
    assert await files.size(name_of(stored)) == 10
    assert await read(files, stored, 0, 10) == b"0123456789"


async def test_a_deleted_file_is_gone_and_may_be_deleted_again(files: FileStore) -> None:
    name = files.new_name("video.mp4", "video/mp4")
    stored = await files.put("video.mp4", b"0123456789", "video/mp4", name)
    assert name_of(stored) == name
    other = await files.put("video.mp4", b"other", "video/mp4")
    for _ in range(2):
        await files.delete(name)
        assert await files.size(name) is None
    assert await files.size(name_of(other)) == 5


async def test_nothing_outside_the_store_can_be_deleted(files: FileStore, tmp_path: Path) -> None:
    outside = tmp_path / "outside.mp4"
    outside.write_bytes(b"x")
    await files.delete("../outside.mp4")
    assert outside.exists()


async def test_a_part_is_read_without_the_rest(files: FileStore) -> None:
    stored = await files.put("video.mp4", b"0123456789", "video/mp4")
    assert await read(files, stored, 3, 7) == b"3456"


async def test_long_files_are_read_in_chunks(files: FileStore) -> None:
    data = bytes(range(256)) * (CHUNK_BYTES // 256 * 2 + 1)
    stored = await files.put("video.mp4", data, "video/mp4")
    chunks = [chunk async for chunk in files.read(name_of(stored), 1, len(data))]
    assert [len(chunk) for chunk in chunks] == [CHUNK_BYTES, CHUNK_BYTES, 255]
    assert b"".join(chunks) == data[1:]


async def test_an_empty_file_is_a_file(files: FileStore) -> None:
    stored = await files.put("video.mp4", b"", "video/mp4")
    assert await files.size(name_of(stored)) == 0
    assert await read(files, stored, 0, 0) == b""


async def test_names_cannot_be_guessed_and_differ(files: FileStore) -> None:
    stored = [await files.put("video.mp4", b"x", "video/mp4") for _ in range(3)]
    assert len({file.path for file in stored}) == 3
    assert all(re.fullmatch(r"/files/[0-9a-f]{32}/video\.mp4", file.path) for file in stored)


@pytest.mark.parametrize(
    ("hint", "content_type", "kept_as"),
    [
        ("../../etc/passwd", "video/mp4", "passwd.mp4"),
        ("a b\"c'\r\n.mp4", "video/mp4", "a-b-c.mp4"),
        ("page.html", "text/html", "page.bin"),
        ("x.html", "image/png", "x.png"),
        ("日本.mp4", "video/mp4", "file.mp4"),
        ("", "video/mp4", "file.mp4"),
        ("n" * 300 + ".mp4", "video/mp4", "n" * 64 + ".mp4"),
    ],
)
async def test_a_hint_never_becomes_more_than_a_plain_name(files: FileStore, hint: str, content_type: str, kept_as: str) -> None:
    stored = await files.put(hint, b"x", content_type)
    assert stored.path.rpartition("/")[2] == kept_as
    assert await files.size(name_of(stored)) == 1


@pytest.mark.parametrize("name", ["", "..", "../secret.mp4", "0" * 32, "0" * 32 + "/../../secret.mp4", "/etc/passwd", "a\0b"])
async def test_no_other_name_is_looked_up(files: FileStore, name: str) -> None:
    assert await files.size(name) is None


async def test_an_unknown_name_has_no_size(files: FileStore) -> None:
    assert await files.size("0" * 32 + "/video.mp4") is None


async def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "rename", full)
    files = FileStore(str(tmp_path))
    assert isinstance(files._fs, LocalFileSystem)
    with pytest.raises(OSError, match="no space left"):
        await files.put("video.mp4", b"x", "video/mp4")
    assert os.listdir(tmp_path) == []
