"""GET /files: serves stored files, with ranges and safe headers, to those who may read them.

A file may contain bytes that a caller chose. So browsers may show only the few types on an allow-list and must download all
others, and no file can run as a page of this origin. Ranges and conditions: RFC 9110, sections 13 and 14.
"""

import re
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from starlette.requests import HTTPConnection

from deployments.files.file_store import CONTENT_TYPES, FileStore, expires_at, is_listed
from deployments.files.uploads import take_in
from deployments.ingress.access import Caller, reader_of
from deployments.ingress.request_context import TextRoute, files_of, store_of
from deployments.schemas.uploads import UNKNOWN_TYPE, AccessRules, served_type
from engines.errors import Forbidden, NotFound, PreconditionFailed

HEADERS = {
    "accept-ranges": "bytes",
    # the URL is the permission: any page that knows it may read the file, e.g. to draw it on a canvas
    "access-control-allow-origin": "*",
    "content-security-policy": "sandbox; default-src 'none'; img-src 'self'; media-src 'self'; style-src 'unsafe-inline'",
    "cross-origin-resource-policy": "cross-origin",
    "x-content-type-options": "nosniff",
}
INLINE = frozenset(CONTENT_TYPES.values())
CACHE_S = 3600
"""The longest, in seconds. A file never changes, but it expires, and no cache may keep it longer. Asking again costs a 304."""
MAX_RANGES = 32
"""More at once, or ranges that overlap, are answered with the whole file: their sender makes us work for nothing."""

_RANGE = re.compile(r"(\d{0,18})-(\d{0,18})")
_ETAGS = re.compile(r'\s*(?:W/)?("[^"]*")\s*(?:,|$)')

_FILE_ANSWERS: dict[int | str, Any] = {
    200: {"description": "The file.", "content": {"*/*": {"schema": {}}}},
    206: {"description": "The range.", "content": {"*/*": {"schema": {}}}},
    304: {"description": "The file has not changed."},
    416: {"description": "The range begins after the end of the file."},
}

router = APIRouter(route_class=TextRoute)


@dataclass(frozen=True)
class Readable:
    """A file that may be read. until: when it expires, in seconds since 1970; None: never. shared: everybody may read it."""

    size: int
    content_type: str
    until: float | None
    shared: bool


class RangeNotSatisfiable(Exception):
    """All ranges begin after the end of the file."""


@router.head("/files/{name:path}", include_in_schema=False)
@router.get("/files/{name:path}", response_class=Response, responses=_FILE_ANSWERS)
async def file(request: Request, name: str) -> Response:
    """A file, or the parts of it that are asked for."""
    found = await readable(request, name)
    if found is None:
        raise NotFound("There is no such file.")
    return _answer(request, name, found)


async def readable(connection: HTTPConnection, name: str, reader: Caller | None = None) -> Readable | None:
    """The file at "/files/<name>". reader: None: whoever asks for it.

    None: there is none, or it is to look as if there were none. Raises `Forbidden`. The database is asked for listed files only.
    """
    files = files_of(connection)
    if not is_listed(name):
        content_type = CONTENT_TYPES.get("." + name.rpartition(".")[2], UNKNOWN_TYPE)
        size = await files.size(name)
        return None if size is None else Readable(size, content_type, expires_at(name), shared=True)
    uploads = store_of(connection).uploads
    row = await uploads.file(name)
    if row is None:
        return None
    if row.access is not None:
        reader = reader or await reader_of(connection)
        decision = "allow" if reader.reaches(row.owner) else AccessRules.model_validate(row.access).decision(reader.owner)
        if decision == "hide":
            return None
        if decision == "forbid":
            raise Forbidden("The owner of this file does not let you read it.")
    size = await (take_in(files, name, row.size_bytes) if row.unsettled else files.size(name))
    if size is None or (row.unsettled and not await uploads.settle(name, size, row.size_bytes)):
        return None
    until = None if row.expires_at.year == datetime.max.year else row.expires_at.replace(tzinfo=UTC).timestamp()
    return Readable(size, row.content_type or UNKNOWN_TYPE, until, shared=row.access is None)


def _answer(request: Request, name: str, found: Readable) -> Response:
    folder, file_name = name.split("/")[-2:]
    etag, content_type = f'"{folder}"', served_type(found.content_type)
    is_inline = content_type.partition(";")[0].strip().lower() in INLINE
    headers = {
        **HEADERS,
        "etag": etag,
        "cache-control": _cache_control(found),
        "content-disposition": f'{"inline" if is_inline else "attachment"}; filename="{file_name}"',
    }
    if not _names(request.headers.get("if-match", "*"), etag):
        raise PreconditionFailed
    if _names(request.headers.get("if-none-match", ""), etag):
        return Response(status_code=304, headers=headers)
    asked = request.headers.get("range", "") if request.method == "GET" else ""
    if request.headers.get("if-range", etag) != etag:
        asked = ""
    try:
        ranges = byte_ranges(asked, found.size)
    except RangeNotSatisfiable:
        return Response(status_code=416, headers={**HEADERS, "content-range": f"bytes */{found.size}"})
    files = files_of(request)
    if len(ranges) > 1:
        return _several(files, name, found.size, content_type, ranges, headers)
    start, stop = ranges[0] if ranges else (0, found.size)
    headers |= {"content-length": str(stop - start), "content-type": content_type}
    if ranges:
        headers["content-range"] = f"bytes {start}-{stop - 1}/{found.size}"
    if request.method == "HEAD":
        return Response(headers=headers)
    return StreamingResponse(files.read(name, start, stop), status_code=206 if ranges else 200, headers=headers)


def _cache_control(found: Readable) -> str:
    if not found.shared:
        return "private, no-store"
    max_age_s = CACHE_S if found.until is None else max(0, min(CACHE_S, int(found.until - time.time())))
    return f"public, max-age={max_age_s}, immutable"


def _names(header: str, etag: str) -> bool:
    """Whether a condition's list of tags is for this one."""
    return header.strip() == "*" or etag in _ETAGS.findall(header)


def byte_ranges(header: str, size: int) -> list[tuple[int, int]]:
    """(start, stop) of the ranges in a Range header. Empty: the whole file is to be sent.

    That is so for a malformed header, and for too many ranges or overlapping ones. Raises `RangeNotSatisfiable`.
    """
    unit, _, specs = header.replace(" ", "").partition("=")
    if unit.lower() != "bytes" or specs.count(",") >= MAX_RANGES:
        return []
    ranges = []
    for spec in specs.split(","):
        match = _RANGE.fullmatch(spec)
        if match is None or spec == "-":
            return []
        first, last = match.groups()
        if first and last and int(last) < int(first):
            return []
        start = int(first) if first else max(0, size - int(last))  # "-500": the last 500 bytes
        stop = min(int(last) + 1, size) if first and last else size
        if start < stop:
            ranges.append((start, stop))
    if not ranges:
        raise RangeNotSatisfiable
    ordered = sorted(ranges)
    overlap = any(stop > start for (_, stop), (start, _) in pairwise(ordered))
    return [] if overlap else ranges


def _several(
    files: FileStore, name: str, size: int, content_type: str, ranges: Sequence[tuple[int, int]], headers: dict[str, str]
) -> Response:
    """Several parts in one answer: multipart/byteranges."""
    boundary = secrets.token_hex(16)
    heads = [
        f"\r\n--{boundary}\r\ncontent-type: {content_type}\r\ncontent-range: bytes {start}-{stop - 1}/{size}\r\n\r\n".encode()
        for start, stop in ranges
    ]
    end = f"\r\n--{boundary}--\r\n".encode()

    async def parts() -> AsyncIterator[bytes]:
        for head, (start, stop) in zip(heads, ranges, strict=True):
            yield head
            async for chunk in files.read(name, start, stop):
                yield chunk
        yield end

    length = sum(map(len, heads)) + sum(stop - start for start, stop in ranges) + len(end)
    headers |= {"content-length": str(length), "content-type": f"multipart/byteranges; boundary={boundary}"}
    return StreamingResponse(parts(), status_code=206, headers=headers)
