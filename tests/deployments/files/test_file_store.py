import asyncio
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from deployments.files.file_store import CHUNK_BYTES, LEFT_AFTER_S, FileStore, StoredFile
from engines.errors import StorageFailed


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


async def test_an_input_is_kept_but_never_served(files: FileStore, tmp_path: Path) -> None:
    name = files.new_input()
    await files.put_input(name, b"a picture")
    await files.copy(name, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"a picture"
    assert await files.size(name) is None
    await files.delete(name)
    with pytest.raises(StorageFailed):
        await files.copy(name, tmp_path / "copy")


async def test_an_unknown_name_has_no_size(files: FileStore) -> None:
    assert await files.size("0" * 32 + "/video.mp4") is None


CHECKPOINT = "checkpoints/0190aaaa-0000-7000-8000-000000000001"


async def test_a_checkpoint_takes_the_place_of_the_one_before(files: FileStore) -> None:
    assert await files.get_checkpoint(CHECKPOINT, "step") is None
    for data in (b"step 1", b"step 2, and longer", b""):
        await files.put_checkpoint(CHECKPOINT, "step", data)
        assert await files.get_checkpoint(CHECKPOINT, "step") == data


async def test_a_checkpoint_is_nobodys_to_fetch(files: FileStore) -> None:
    await files.put_checkpoint(CHECKPOINT, "latents", b"latents")
    assert await files.size(f"{CHECKPOINT}/latents.safetensors") is None


async def test_a_deleted_checkpoint_is_gone_and_may_be_deleted_again(files: FileStore) -> None:
    other = CHECKPOINT[:-1] + "2"
    for name in (CHECKPOINT, other):
        await files.put_checkpoint(name, "step", b"step")
        await files.put_checkpoint(name, "latents", b"latents")
    for _ in range(2):
        await files.delete(CHECKPOINT)
        assert await files.get_checkpoint(CHECKPOINT, "step") is None
        assert await files.get_checkpoint(CHECKPOINT, "latents") is None
    assert await files.get_checkpoint(other, "latents") == b"latents"


async def test_readers_of_a_checkpoint_that_two_write_find_one_of_them_whole(tmp_path: Path) -> None:
    files = FileStore(str(tmp_path))
    contents = [bytes([i]) * 100_000 for i in range(8)]
    await files.put_checkpoint(CHECKPOINT, "step", contents[0])

    async def write(data: bytes) -> None:
        for _ in range(5):
            await files.put_checkpoint(CHECKPOINT, "step", data)

    async with asyncio.TaskGroup() as group:
        writers = [group.create_task(write(data)) for data in contents]
        while not all(writer.done() for writer in writers):
            assert await files.get_checkpoint(CHECKPOINT, "step") in contents
    assert files_in(tmp_path) == [f"{CHECKPOINT}/step.safetensors"]


def files_in(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


async def test_what_a_killed_writer_has_left_is_deleted_and_what_is_being_written_stays(tmp_path: Path) -> None:
    files = FileStore(str(tmp_path))
    await files.delete_incomplete()
    code = (
        "import os, signal, sys; from pathlib import Path; from deployments.files.file_store import FileStore;"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL);"
        "import asyncio; asyncio.run(FileStore(sys.argv[1]).put('video.mp4', b'half', 'video/mp4'))"
    )
    writer = await asyncio.create_subprocess_exec(sys.executable, "-c", code, tmp_path)
    assert await writer.wait() == -signal.SIGKILL
    [left] = files_in(tmp_path)
    await files.delete_incomplete()
    assert files_in(tmp_path) == [left], "its writer may be at work"
    os.utime(tmp_path / left, times=(0, time.time() - LEFT_AFTER_S - 1))
    await files.delete_incomplete()
    assert files_in(tmp_path) == []


async def test_a_failed_write_leaves_the_checkpoint_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = FileStore(str(tmp_path))
    await files.put_checkpoint(CHECKPOINT, "step", b"step 1")
    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(StorageFailed):
        await files.put_checkpoint(CHECKPOINT, "step", b"step 2")
    assert await files.get_checkpoint(CHECKPOINT, "step") == b"step 1"
    assert files_in(tmp_path) == [f"{CHECKPOINT}/step.safetensors"]


def full(self: Path, target: Path) -> Path:
    raise OSError("no space left")


async def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "rename", full)
    files = FileStore(str(tmp_path))
    assert isinstance(files.fs, LocalFileSystem)
    with pytest.raises(StorageFailed):
        await files.put("video.mp4", b"x", "video/mp4")
    assert files_in(tmp_path) == []


class Unreachable(Exception):
    """Like botocore's `EndpointConnectionError`, which is no `OSError`."""


class Bucket(AbstractFileSystem):
    protocol = "unreachable"

    def _away(self, *_: Any, **__: Any) -> Any:
        raise Unreachable

    info = cat_file = pipe_file = rm_file = _away


fsspec.register_implementation("unreachable", Bucket, clobber=True)


@pytest.mark.parametrize(
    "call",
    [
        lambda files: files.put("video.mp4", b"x", "video/mp4"),
        lambda files: files.size("0" * 32 + "/video.mp4"),
        lambda files: anext(files.read("0" * 32 + "/video.mp4", 0, 1)),
        lambda files: files.delete("0" * 32 + "/video.mp4"),
        lambda files: files.put_checkpoint(CHECKPOINT, "step", b"x"),
        lambda files: files.get_checkpoint(CHECKPOINT, "step"),
        lambda files: files.delete(CHECKPOINT),
    ],
)
async def test_a_bucket_that_cannot_be_reached_is_a_storage_failure_whatever_its_library_raises(call: Any) -> None:
    with pytest.raises(StorageFailed) as raised:
        await call(FileStore("unreachable://bucket"))
    assert isinstance(raised.value.__cause__, Unreachable)


async def test_a_file_is_gone_when_its_time_is_over_even_if_it_is_not_deleted_yet(
    files: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = files.new_name("video.mp4", "video/mp4", keep_s=60)
    await files.put("video.mp4", b"x", "video/mp4", name)
    assert await files.size(name) == 1
    now = time.time()
    monkeypatch.setattr("deployments.files.file_store.time.time", lambda: now + 61)
    assert await files.size(name) is None
    await files.delete(name)
    monkeypatch.undo()
    assert await files.size(name) is None
