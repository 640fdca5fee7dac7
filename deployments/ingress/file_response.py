"""GET /files: serves stored files, with ranges and safe headers.

A file may contain bytes that a caller chose. So browsers may show only the few types on an allow-list and must download all
others, and no file can run as a page of this origin. Ranges: RFC 9110 section 14, one range at a time.
"""

import re
import time

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from deployments.files.file_store import CONTENT_TYPES, FileStore, expires_at
from engines.errors import NotFound

HEADERS = {
    "accept-ranges": "bytes",
    # the URL is the permission: any page that knows it may read the file, e.g. to draw it on a canvas
    "access-control-allow-origin": "*",
    "content-security-policy": "sandbox; default-src 'none'; img-src 'self'; media-src 'self'; style-src 'unsafe-inline'",
    "cross-origin-resource-policy": "cross-origin",
    "x-content-type-options": "nosniff",
}
CACHE_S = 3600
"""The longest, in seconds. A file never changes, but it expires, and no cache may keep it longer. Asking again costs a 304."""

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


class RangeNotSatisfiable(Exception):
    """The requested range begins after the end of the file."""


def byte_range(header: str, size: int) -> tuple[int, int] | None:
    """(start, stop) of a Range header; None to send the whole file, for several ranges or a malformed header.

    Raises `RangeNotSatisfiable`.
    """
    match = _RANGE.fullmatch(header.replace(" ", ""))
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:  # "-500": the last 500 bytes
        start, stop = max(0, size - int(last)), size
    else:
        start, stop = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < int(first):
            return None
    if start >= size:
        raise RangeNotSatisfiable
    return start, stop


async def file_response(files: FileStore, name: str, request: Request) -> Response:
    """The file at "/files/<name>", or the requested part. Raises `NotFound`."""
    size = await files.size(name)
    if size is None:
        raise NotFound("There is no such file.")
    folder, _, file_name = name.partition("/")
    content_type = CONTENT_TYPES.get("." + file_name.rpartition(".")[2])
    headers = {**HEADERS, "etag": f'"{folder}"'}
    until = expires_at(name)
    max_age_s = CACHE_S if until is None else max(0, min(CACHE_S, int(until - time.time())))
    headers["cache-control"] = f"public, max-age={max_age_s}, immutable"
    headers["content-disposition"] = f'{"inline" if content_type else "attachment"}; filename="{file_name}"'
    if headers["etag"] in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)

    asked = request.headers.get("range", "") if request.method == "GET" else ""
    if request.headers.get("if-range", headers["etag"]) != headers["etag"]:
        asked = ""
    try:
        part = byte_range(asked, size)
    except RangeNotSatisfiable:
        return Response(status_code=416, headers={"content-range": f"bytes */{size}"})
    start, stop = part or (0, size)
    headers["content-length"] = str(stop - start)
    headers["content-type"] = content_type or "application/octet-stream"
    if part:
        headers["content-range"] = f"bytes {start}-{stop - 1}/{size}"
    if request.method == "HEAD":
        return Response(headers=headers)
    return StreamingResponse(files.read(name, start, stop), status_code=206 if part else 200, headers=headers)
