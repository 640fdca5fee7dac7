"""Files that are larger than what may be held in memory: received piece by piece, put together from parts, or sent to the bucket.

Nothing here holds more of a file than `PIECE_BYTES`, or a block that goes to an object store.
"""

import asyncio
import hashlib
import math
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

from deployments.files.file_store import CHUNK_BYTES, FileStore, durable_file, translated
from engines.errors import BadRequest, BodyTooSlow

PIECE_BYTES = 1 << 18
"""Large enough for few calls of threads, small enough for hundreds of bodies at once."""
BLOCK_BYTES = 8 << 20
"""Sent to an object store at once. S3 takes at most 10,000 blocks of a file, all but the last of `MIN_BLOCK_BYTES` or more."""
MIN_BLOCK_BYTES = 5 << 20

IDLE_S = 60.0
"""How long a body may send nothing."""
SLOWEST_BYTES_PER_S = 10_000
"""How slow a body may be on average, after `IDLE_S` for its beginning."""


async def receive(
    files: FileStore,
    name: str,
    body: AsyncIterator[bytes],
    size: int,
    most_s: float,
    approve: Callable[[bytes], Awaitable[None]] | None = None,
) -> bytes:
    """Stores a body of `size` bytes under `name` and returns their SHA-256. If it fails, nothing is stored.

    most_s: how long it may take, in seconds. approve: is given the SHA-256 before anything can be read; if it raises, nothing is
    stored. Raises `StorageFailed`, and `BadRequest` for a body that is too slow or too short.
    """
    writing = _Writing(_file(files, files.path(name)))
    try:
        digest = await _read(body, size, most_s, writing.write)
        if approve is not None:
            await approve(digest)
        with translated():
            await asyncio.to_thread(writing.commit)
    except BaseException as exc:
        await asyncio.shield(asyncio.to_thread(writing.discard, exc))
        raise
    return digest


async def digest_of(body: AsyncIterator[bytes], size: int, most_s: float) -> bytes:
    """The same without storing anything: for a body that may be one sent again."""
    return await _read(body, size, most_s, lambda _: None)


async def assemble(files: FileStore, name: str, parts: Sequence[str], sizes: Sequence[int]) -> None:
    """Stores the parts of these names and sizes, in this order, as one file. Raises `StorageFailed`."""
    paths = [files.path(part) for part in parts]
    with translated():
        if not files.is_local and hasattr(files.fs, "merge") and min(sizes[:-1], default=MIN_BLOCK_BYTES) >= MIN_BLOCK_BYTES:
            await asyncio.to_thread(_merge, files, files.path(name), paths)
        else:
            await asyncio.to_thread(_concatenate, files, files.path(name), paths)


async def direct_url(files: FileStore, name: str, content_type: str, size: int | None, open_s: float) -> str:
    """A URL of the bucket's own to PUT a file to, for this name and type and, if it is given, size. Raises `StorageFailed`.

    name: where it arrives. As long as the URL is good, whoever has it may send any number of bytes there, again and again.
    """
    bound: dict[str, Any] = {"ContentType": content_type} | ({} if size is None else {"ContentLength": size})
    with translated():
        url: str = await asyncio.to_thread(
            files.fs.url, files.path(name), expires=int(open_s), client_method="put_object", **bound
        )
    return url


async def take_in(files: FileStore, name: str, most: int) -> int | None:
    """Makes the file `name` of what has arrived for it in the bucket, within the bucket, and returns its size in bytes.

    None: nothing has arrived. What has more than `most` bytes is deleted instead. Raises `StorageFailed`.
    """
    with translated():
        return await asyncio.to_thread(_take_in, files.fs, files.path(name), files.path(files.arriving(name)), most)


async def _read(body: AsyncIterator[bytes], size: int, most_s: float, write: Callable[[bytearray], None]) -> bytes:
    """Passes a body to `write` in pieces; returns its SHA-256."""
    digest, received, piece, chunks = hashlib.sha256(), 0, bytearray(), aiter(body)
    clock = asyncio.get_running_loop().time

    def take(piece: bytearray) -> None:
        digest.update(piece)
        write(piece)

    waited_s = 0.0  # for the caller: he is not to blame for a slow disk
    while True:
        began = clock()
        try:
            async with asyncio.timeout(min(IDLE_S, IDLE_S + received / SLOWEST_BYTES_PER_S - waited_s, most_s - waited_s)):
                chunk = await anext(chunks, b"")
        except TimeoutError:
            raise BodyTooSlow from None
        waited_s += clock() - began
        received += len(chunk)
        piece += chunk
        if len(piece) >= PIECE_BYTES or received == size or not chunk:
            with translated():
                await asyncio.to_thread(take, piece)
            piece = bytearray()
        if received >= size or not chunk:
            break
    if received != size:
        raise BadRequest("The body is not as long as it said.")
    return digest.digest()


class _Writing:
    """A file in the hands of several threads, one at a time. A thread works on although its caller was cancelled."""

    def __init__(self, file: AbstractContextManager[BinaryIO]) -> None:
        self._context = file
        self._opened = ExitStack()
        self._file: BinaryIO | None = None
        self._lock = Lock()

    def write(self, piece: bytearray) -> None:
        with self._lock:
            if self._file is None:
                self._file = self._opened.enter_context(self._context)
            self._file.write(piece)

    def commit(self) -> None:
        with self._lock:
            self._opened.close()

    def discard(self, reason: BaseException) -> None:
        with self._lock:
            self._opened.__exit__(type(reason), reason, None)


def _file(files: FileStore, path: str) -> AbstractContextManager[BinaryIO]:
    """A file to write, which is there only after the block, and not if that fails."""
    return durable_file(Path(path), files.incomplete) if files.is_local else _bucket_file(files.fs, path)


@contextmanager
def _bucket_file(fs: Any, path: str) -> Iterator[BinaryIO]:
    file = fs.open(path, "wb", block_size=BLOCK_BYTES)
    try:
        yield file
        file.close()
    except BaseException:
        file.discard()
        file.closed = True  # or it would be stored when it is closed by the garbage collector
        raise


def _take_in(fs: Any, path: str, arriving: str, most: int) -> int | None:
    if (size := _size(fs, path)) is not None:  # taken in before; what has arrived since is another file
        return size
    try:
        there = fs.info(arriving)
        if there["size"] <= most:
            fs.cp_file(arriving, path, CopySourceIfMatch=there["ETag"])
        fs.rm_file(arriving)
    except Exception:  # nothing has arrived, or another process is faster
        if (size := _size(fs, path)) is not None or _size(fs, arriving) is None:
            return size
        raise
    return int(there["size"])


def _size(fs: Any, path: str) -> int | None:
    try:
        return int(fs.info(path)["size"])
    except FileNotFoundError:
        return None


def _merge(files: FileStore, path: str, parts: Sequence[str]) -> None:
    """Within the bucket."""
    try:
        files.fs.merge(path, parts)
    except BaseException:
        files.abort_uploads(path, -math.inf)
        raise


def _concatenate(files: FileStore, path: str, parts: Sequence[str]) -> None:
    with _file(files, path) as file:
        for part in parts:
            with files.fs.open(part, "rb", block_size=BLOCK_BYTES) as source:
                shutil.copyfileobj(source, file, CHUNK_BYTES)
