"""The bodies of requests: read within bounds, and split before they are parsed.

A submission may be 64 MB, nearly all of it data URIs. Those are taken out first, so what is parsed as JSON is short. Parsing
holds the GIL and would stop the event loop from any thread: for 140 ms with 60 MB in one string, for 115 ms with 1 MB of small
fields (2 cores). For the same reason everything here works on large bodies piece by piece.
"""

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import Request
from pydantic_core import from_json

from deployments.files.download import Refused
from engines.errors import BodyTooLarge, BodyTooSlow, TooManyRequests

BODY_TIMEOUT_S = 60.0
ROOM_TIMEOUT_S = 60.0
"""How long a body waits for room before its sender is told to try again."""
SMALL_BYTES = 65_536
"""Bodies up to this have room of their own, so they do not wait for large ones."""
MAX_FIELDS_BYTES = 200_000
"""Of a submission without its large data URIs: parsing it takes 20 ms at most."""
INLINE_BYTES = 16_384
"""Data URIs up to this stay where they are: each of the others becomes a file."""
PIECE_BYTES = 1 << 18
MOST_MARKS = 1000

_MARK = b'"data:'
_BACKSLASH = ord("\\")


class Bodies:
    """Room for the bodies that this process holds at once. max_bytes: of them all together.

    turn: held by the one large body whose files are being decoded. Several threads that decode take turns with the GIL, and the
    event loop waits for each of them: 0.3 s with 64 bodies of 60 MB, 0.04 s with a turn, in the same time (2 cores).
    """

    def __init__(self, max_bytes: int):
        self._small = _Room(max_bytes // 4)
        self._large = _Room(max_bytes - max_bytes // 4)
        self.turn = asyncio.Lock()

    @asynccontextmanager
    async def read(self, request: Request, max_bytes: int) -> AsyncIterator[bytearray]:
        """The body, for which there is room until the block ends. Before there is, nothing is read of it.

        Raises `BodyTooLarge`, `BodyTooSlow`, `TooManyRequests`.
        """
        declared = request.headers.get("content-length", "")
        size = int(declared) if declared.isdecimal() else max_bytes
        if size > max_bytes:
            raise _too_large(max_bytes)
        async with self._room(size).taken(size):
            yield await read_body(request, max_bytes)

    def hold(self, size: int) -> Callable[[], None]:
        """Room for a message that has come already. Returns what gives it back. Raises `TooManyRequests`."""
        room = self._room(size)
        room.take(size)
        return partial(room.give, size)

    def _room(self, size: int) -> "_Room":
        return self._small if size <= SMALL_BYTES else self._large


class _Room:
    """So many bytes; who finds too few waits, first come first served."""

    def __init__(self, size: int):
        self._size = self._free = size
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()

    @asynccontextmanager
    async def taken(self, size: int) -> AsyncIterator[None]:
        size = min(size, self._size)
        try:
            async with asyncio.timeout(ROOM_TIMEOUT_S), self._turn:
                while self._free < size:
                    self._freed.clear()
                    await self._freed.wait()
                self._free -= size
        except TimeoutError:
            raise TooManyRequests("Too many large requests are being received. Try again.") from None
        try:
            yield
        finally:
            self.give(size)

    def take(self, size: int) -> None:
        """Takes what is free at once. Raises `TooManyRequests`."""
        if size > self._free:
            raise TooManyRequests("Too many large requests are being received. Try again.")
        self._free -= size

    def give(self, size: int) -> None:
        self._free += size
        self._freed.set()


async def read_body(request: Request, max_bytes: int) -> bytearray:
    """The body. Stops reading when it is longer than `max_bytes` or too slow. Raises `BodyTooLarge`, `BodyTooSlow`."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise _too_large(max_bytes)
    except TimeoutError:
        raise BodyTooSlow from None
    return body


@dataclass(frozen=True)
class SplitBody:
    """A submission's body. fields: its JSON, with a name in place of each large data URI. uris: name -> the URI as it was sent,
    with JSON's escapes. The names are data URIs themselves, and cannot be guessed.
    """

    fields: bytes
    uris: dict[str, memoryview]

    @property
    def size_bytes(self) -> int:
        """Of the files in `uris`, at most."""
        return sum(len(uri) for uri in self.uris.values()) * 3 // 4

    def digest_fields(self) -> bytes:
        """`fields` with a hash in place of each name: the same for the same body."""
        digest = self.fields
        for name, uri in self.uris.items():
            digest = digest.replace(name.encode(), b"data:sha256," + hashlib.sha256(uri).hexdigest().encode())
        return digest


async def split(body: bytearray) -> SplitBody:
    """Takes the large data URIs out of a body. Raises `BodyTooLarge` if too much is left."""
    return _split(body) if len(body) <= SMALL_BYTES else await asyncio.to_thread(_split, body)


def take_out(fields: dict[str, Any], size: int) -> dict[str, memoryview]:
    """The same for fields that came in another form than JSON, in `size` bytes. Returns `SplitBody.uris`; `fields` is changed."""
    uris = dict[str, memoryview]()
    for field, value in fields.items():
        if isinstance(value, str) and len(value) > INLINE_BYTES and value.startswith("data:"):
            name = _new_name()
            uris[name], fields[field] = memoryview(value.encode()), name
    _check_rest(size - sum(map(len, uris.values())))
    return uris


def _split(body: bytearray) -> SplitBody:
    """In valid JSON an unescaped quote before `data:` begins a string, and no data URI contains a quote. What looks otherwise is
    left for the parser."""
    view, uris = memoryview(body), dict[str, memoryview]()
    parts, copied, at = list[bytes | memoryview](), 0, 0
    for _ in range(MOST_MARKS if len(body) > INLINE_BYTES else 0):
        start = _find(body, _MARK, at)
        at = _find(body, b'"', start + 1) if start >= 0 else -1
        if at < 0:
            break
        escaped = (start > 0 and body[start - 1] == _BACKSLASH) or body[at - 1] == _BACKSLASH
        if at - start > INLINE_BYTES and not escaped:
            name = _new_name()
            uris[name] = view[start + 1 : at]
            parts += [view[copied : start + 1], name.encode()]
            copied = at
    parts.append(view[copied:])
    _check_rest(sum(map(len, parts)))
    return SplitBody(b"".join(parts), uris)


def _new_name() -> str:
    return f"data:reelray,{secrets.token_hex(16)}"


def _check_rest(size: int) -> None:
    if size > MAX_FIELDS_BYTES:
        raise BodyTooLarge(f"The request body is larger than {MAX_FIELDS_BYTES} bytes, its data URIs not counted.")


def _find(body: bytearray, mark: bytes, start: int) -> int:
    for begin in range(start, len(body), PIECE_BYTES):
        if (found := body.find(mark, begin, begin + PIECE_BYTES + len(mark) - 1)) >= 0:
            return found
    return -1


def unescaped(text: memoryview) -> Iterator[bytes]:
    """The inside of a JSON string, in pieces without JSON's escapes. Raises `Refused`."""
    start = 0
    while start < len(text):
        piece = bytes(text[start : start + PIECE_BYTES])
        if b"\\" not in piece:
            yield piece
        else:
            edge = piece.rfind(b"\\", -6)  # the longest escape has six characters: it may end in the next piece
            if edge >= 0 and start + len(piece) < len(text):
                piece = piece[:edge].rstrip(b"\\")
            if not piece:
                raise Refused("the data URI is not valid base64.")
            try:
                yield from_json(b'"' + piece + b'"').encode()
            except ValueError as exc:
                raise Refused("the data URI is not valid base64.") from exc
        start += len(piece)


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request body is larger than {max_bytes} bytes.")
