"""Bytes to URL: where finished files are kept, and how they are read back in pieces.

A file is written once under a name that cannot be guessed and never changes, so its URL is the permission to read it and
may be cached as long as the file is kept. Any fsspec URL will do; a local folder is the default. There are two kinds of names:

- `<random>[-<until>]/<name>`: what a job made, for everybody. The name says how long it is kept and of what type it is.
- `b/<random>/<name>`, as at fal: a *listed* file. The database says who may read it, for how long, and of what type it is.

The checkpoints of jobs are stored beside them, a folder each: overwritten again and again, and never served. Nor are the files
that came with an input, and the parts of uploads. `uploads.py` writes what is too large to be held in memory.
"""

import asyncio
import os
import re
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import get_protocol

from deployments.schemas.responses import URL_PREFIX
from engines.errors import StorageFailed

CHUNK_BYTES = 1 << 20
"""Read at once: large enough that an object store's round trip does not dominate, small enough for hundreds of readers."""

CONTENT_TYPES = {
    ".gif": "image/gif",
    ".jpg": "image/jpeg",
    ".mp4": "video/mp4",
    ".png": "image/png",
    ".webm": "video/webm",
    ".webp": "image/webp",
}
"""Suffix -> type of the files with it. All other types get the suffix `.bin`, which no browser interprets."""

_SUFFIXES = {content_type: suffix for suffix, content_type in CONTENT_TYPES.items()}
LEFT_AFTER_S = 3600.0
"""The age in seconds from which on a file that is not complete is taken for a killed writer's."""
LEFT_IN_BUCKET_S = 7 * 86_400.0
"""The same for an upload to a bucket, which tells only when it began."""

Part = Literal["step", "latents"]
"""The files of a checkpoint: its last step and, later, the finished latents, which no stalled write of a step can replace."""

_NAME = re.compile(r"[0-9a-f]{32}(?:-(\d{1,12}))?/[A-Za-z0-9_-]+\.[a-z0-9]+")
_CHECKPOINT = re.compile(r"checkpoints/[0-9a-f-]{36}")
_INCOMPLETE = "incomplete"
"""The folder of files that are being written, in a local file store."""

_INPUT = re.compile(r"inputs/[0-9a-f]{32}/data")
_LISTED = re.compile(r"b/[0-9a-f]{32}/[A-Za-z0-9_-]+\.[a-z0-9]+")
_PART = re.compile(r"parts/[0-9a-f]{32}/\d{1,5}")
_SUFFIX = re.compile(r"\.[a-z0-9]{1,10}")


@dataclass(frozen=True)
class StoredFile:
    """A file that was stored. path: "/files/<random>/<name>", to be appended to the service's address. size: in bytes."""

    path: str
    size: int


def expires_at(name: str) -> float | None:
    """When the time of a file is over, in seconds since 1970; None: it is kept for ever."""
    match = _NAME.fullmatch(name)
    return float(match[1]) if match and match[1] else None


def is_listed(name: str) -> bool:
    """Whether it is the name of a file that is served as the database says."""
    return bool(_LISTED.fullmatch(name))


def is_served(name: str) -> bool:
    """Whether a file of this name can be at "/files/<name>"."""
    return bool(_NAME.fullmatch(name) or _LISTED.fullmatch(name))


class FileStore:
    """The files under one fsspec URL. Every call may raise `StorageFailed`."""

    def __init__(self, url: str):
        self.fs, self._root = fsspec.core.url_to_fs(url, **_options(url))

    def new_name(self, name_hint: str, content_type: str, keep_s: float | None = None) -> str:
        """A name for `put` that nobody can guess.

        name_hint: what the download should be called, e.g. "video.mp4"; its suffix is replaced by that of `content_type`.
        keep_s: how long the file is served, in seconds; None is for ever.
        """
        until = "" if keep_s is None else f"-{int(time.time() + keep_s)}"
        return f"{secrets.token_hex(16)}{until}/{_plain(name_hint)}{_SUFFIXES.get(content_type, '.bin')}"

    def new_listed_name(self, name_hint: str, content_type: str) -> str:
        """The same for a file that the database lists. The suffix in the hint stays, unless browsers show files of this type."""
        suffix = Path(name_hint).suffix.lower()
        suffix = _SUFFIXES.get(content_type.partition(";")[0].strip().lower()) or (
            suffix if _SUFFIX.fullmatch(suffix) else ".bin"
        )
        return f"b/{secrets.token_hex(16)}/{_plain(name_hint)}{suffix}"

    async def put(self, name_hint: str, data: bytes, content_type: str, name: str | None = None) -> StoredFile:
        """Stores `data`. On return it is durable; no reader ever sees half of it.

        name: from `new_name`, if it had to be known beforehand; else a new one is made from `name_hint`.
        """
        name = name or self.new_name(name_hint, content_type)
        with translated():
            await asyncio.to_thread(self._write, self.path(name), data)
        return StoredFile(URL_PREFIX + name, len(data))

    async def size(self, name: str) -> int | None:
        """The size in bytes of the file at "/files/<name>"; None if there is none, its time is over, or the name is malformed."""
        if not is_served(name):  # so no name ever leads out of the folder
            return None
        if (until := expires_at(name)) is not None and until <= time.time():
            return None
        with translated():
            try:
                info = await asyncio.to_thread(self.fs.info, self.path(name))
            except FileNotFoundError:
                return None
        return int(info["size"]) if info["type"] == "file" else None

    async def read(self, name: str, start: int, stop: int) -> AsyncIterator[bytes]:
        """The bytes from `start` to before `stop` of a file that `size` knows, in chunks."""
        for begin in range(start, stop, CHUNK_BYTES):
            # No handle stays open between chunks, so a reader who leaves mid-file leaks nothing.
            end = min(begin + CHUNK_BYTES, stop)
            with translated():
                chunk = await asyncio.to_thread(self.fs.cat_file, self.path(name), start=begin, end=end)
            yield chunk

    async def delete(self, name: str) -> None:
        """Deletes the file at "/files/<name>", or the checkpoint, input or part of that name, if there is one."""
        with translated():
            if is_served(name) or _INPUT.fullmatch(name) or _PART.fullmatch(name):
                await asyncio.to_thread(self._delete, self.path(name))
            elif _CHECKPOINT.fullmatch(name):
                for part in get_args(Part):
                    await asyncio.to_thread(self._delete, self.path(f"{name}/{part}.safetensors"))

    async def delete_incomplete(self) -> None:
        """Deletes what killed writers have left: half files, and in a bucket half uploads, which cost as much as whole ones."""
        with translated():
            if self.is_local:
                await asyncio.to_thread(_delete_incomplete, self.incomplete)
            elif hasattr(self.fs, "list_multipart_uploads"):
                await asyncio.to_thread(self.abort_uploads, self._root, LEFT_IN_BUCKET_S)

    async def put_checkpoint(self, name: str, part: Part, data: bytes) -> None:
        """Stores `data` in place of what was stored before; a reader finds either of the two, whole.

        name: "checkpoints/<job id>", as for `delete`.
        """
        assert _CHECKPOINT.fullmatch(name)
        with translated():
            await asyncio.to_thread(self._write, self.path(f"{name}/{part}.safetensors"), data)

    async def get_checkpoint(self, name: str, part: Part) -> bytes | None:
        """What was stored last; None if there is nothing."""
        assert _CHECKPOINT.fullmatch(name)
        with translated():
            try:
                data: bytes = await asyncio.to_thread(self.fs.cat_file, self.path(f"{name}/{part}.safetensors"))
            except FileNotFoundError:
                return None
        return data

    def new_input(self) -> str:
        """A name for `put_input`."""
        return f"inputs/{secrets.token_hex(16)}/data"

    def part_name(self, name: str, number: int) -> str:
        """The name of a part of an upload. name: of the file that it becomes."""
        return f"parts/{name.split('/')[1]}/{number}"

    def arriving(self, name: str) -> str:
        """Where a file is sent to the bucket itself, before it is taken in under its name."""
        return self.part_name(name, 0)

    async def put_input(self, name: str, data: bytes | bytearray) -> None:
        """Stores a file that an input refers to."""
        assert _INPUT.fullmatch(name)
        with translated():
            await asyncio.to_thread(self._write, self.path(name), data)

    async def copy(self, name: str, into: Path) -> None:
        """Copies such a file, or one that is served, to the disk."""
        assert _INPUT.fullmatch(name) or is_served(name)
        with translated():
            await asyncio.to_thread(self.fs.get_file, self.path(name), str(into))

    def _delete(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self.fs.rm_file(path)
        if self.is_local:
            with suppress(OSError):  # the other part of a checkpoint is there
                Path(path).parent.rmdir()

    @property
    def is_local(self) -> bool:
        """Whether the files are in a folder."""
        return isinstance(self.fs, LocalFileSystem)

    @property
    def incomplete(self) -> Path:
        """The folder of files that are being written, where the store is a folder."""
        return Path(self._root, _INCOMPLETE)

    def path(self, name: str) -> str:
        """Where a file is in the file system."""
        return f"{self._root}/{name}"

    def abort_uploads(self, path: str, older_s: float) -> None:
        """Ends the half uploads in a bucket that are at or below a path, and older than this."""
        bucket, _, prefix = path.partition("/")
        for each in self.fs.list_multipart_uploads(bucket):
            if each["Key"].startswith(prefix) and time.time() - each["Initiated"].timestamp() > older_s:
                self.fs.abort_mpu(bucket, each["Key"], each["UploadId"])

    def _write(self, path: str, data: bytes | bytearray) -> None:
        if self.is_local:
            with durable_file(Path(path), self.incomplete) as file:
                file.write(data)
        else:
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self.fs.pipe_file(path, data)  # object stores show an object only when it is complete


def _options(url: str) -> dict[str, Any]:
    """For S3 the signature of its fourth version: those of the second, botocore's default, bind a URL to no size."""
    if get_protocol(url) not in ("s3", "s3a"):
        return {}
    return {"config_kwargs": {"signature_version": "s3v4"} | fsspec.config.conf.get("s3", {}).get("config_kwargs", {})}


@contextmanager
def translated() -> Iterator[None]:
    """Turns a file system's errors into `StorageFailed`. Each kind has errors of its own: botocore's are no `OSError`."""
    try:
        yield
    except Exception as exc:
        raise StorageFailed from exc


def _delete_incomplete(folder: Path) -> None:
    for file in folder.glob("*"):
        with suppress(FileNotFoundError):  # its writer has ended, or another process was faster
            if time.time() - file.stat().st_mtime > LEFT_AFTER_S:
                file.unlink()


@contextmanager
def durable_file(path: Path, incomplete: Path) -> Iterator[BinaryIO]:
    """A file to write, which is there whole after the block, also after a power cut; if the block fails, it is not there at all.

    Temporary file in the folder `incomplete`, fsync, rename, fsync of the folders.
    """
    incomplete.mkdir(parents=True, exist_ok=True)
    temporary = incomplete / secrets.token_hex(8)  # two writers at once have one each
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        made = [folder for folder in path.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        with suppress(OSError):  # it is not there yet, or an older file of the same name is in it
            path.parent.rmdir()
        raise
    for folder in {path.parent, *(folder.parent for folder in made)}:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _plain(name_hint: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", Path(name_hint).stem).strip("-")[:64] or "file"
