"""Uploads, every way that fal's clients send them. fal-queue-protocol.md, section 4.

- With an upload URL: the key asks for one (`initiate`), and whoever has it sends the file, or its parts. The URL's signature
  binds it to one file, its type and size.
- With a token for the CDN: the key asks for it, and it then uploads files, whole or in parts. `uploadId` is such a signature.

A body is never held: it goes to the file store as it arrives. Nothing of it is read before all that can be checked has been.
"""

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import TypeVar
from weakref import WeakValueDictionary

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError

from deployments.files.uploads import assemble, digest_of, direct_url, receive
from deployments.ingress.access import Caller, ticket_in, uploader_of
from deployments.ingress.body import read_body
from deployments.ingress.request_context import InvalidBody, TextRoute, files_of, quotas_of, settings_of, store_of
from deployments.ingress.target_routing import files_base
from deployments.jobs.keys import KeySecret
from deployments.jobs.uploads import UploadIsComplete, UploadIsOver
from deployments.schemas.tokens import CDN_TOKEN_S, Ticket, issue_cdn_token, issue_ticket
from deployments.schemas.uploads import (
    MAX_NAME_CHARS,
    MAX_PARTS,
    Lifecycle,
    UploadedParts,
    UploadRequest,
    media_type,
    read_lifecycle,
    same_type,
)
from engines.errors import BadRequest, BodyTooLarge, Forbidden, LengthRequired, NotFound, StorageFailed

MAX_REQUEST_BYTES = 20_000
MAX_PARTS_BYTES = 1_200_000
MAX_DIGITS = 15
DIRECT_BYTES = 100_000_000
"""Reserved for an upload to the bucket of unknown size. fal's client sends what is above 94 MB in parts, and those come here."""
DIRECT_S = 3600.0
"""How long such a URL is good at most, in seconds. It may not bind the size, so what arrives is looked up until then."""
NO_STORE = {"cache-control": "no-store"}

_SHA256 = re.compile(r"[0-9a-f]{64}")
_assembling = WeakValueDictionary[str, asyncio.Lock]()
"""For each file that this process puts together, so that a call that is repeated does not copy the parts once more."""

M = TypeVar("M", bound=BaseModel)

_UPLOAD_BODY = {"requestBody": {"content": {"application/json": {"schema": UploadRequest.model_json_schema()}}}}

router = APIRouter(prefix="/rest/storage", tags=["files"], route_class=TextRoute)
files = APIRouter(prefix="/files", tags=["files"], route_class=TextRoute)


@router.post("/upload/initiate", openapi_extra=_UPLOAD_BODY)
async def initiate(request: Request, storage_type: str = "") -> Response:
    """Where to PUT a file, with the same content type and without a key, and the URL that it will have."""
    caller, secret = await uploader_of(request)
    asked = await _parsed(request, UploadRequest, MAX_REQUEST_BYTES)
    # the Python client, which says gcs, sends its key along, which a bucket does not take beside its own signature
    direct = settings_of(request).uploads.direct and storage_type != "gcs"
    ticket = await _begin(request, caller, asked, direct=direct)
    file_url = _url(request, ticket)
    if direct:
        files, open_s = files_of(request), _open_s(request, direct=True)
        upload_url = await direct_url(files, files.arriving(ticket.name), ticket.content_type, asked.file_size, open_s)
    else:
        upload_url = f"{file_url}?upload={_signature(request, secret, ticket)}"
    return JSONResponse({"upload_url": upload_url, "file_url": file_url}, headers=NO_STORE)


@router.post("/upload/initiate-multipart", openapi_extra=_UPLOAD_BODY)
async def initiate_multipart(request: Request) -> Response:
    """The same for a file in parts: PUT each to the path with "/<its number>" added, then POST their list to "/complete"."""
    caller, secret = await uploader_of(request)
    ticket = await _begin(request, caller, await _parsed(request, UploadRequest, MAX_REQUEST_BYTES))
    file_url = _url(request, ticket)
    upload_url = f"{file_url}?upload={_signature(request, secret, ticket)}"
    return JSONResponse({"upload_url": upload_url, "file_url": file_url}, headers=NO_STORE)


@router.post("/auth/token")
async def cdn_token(request: Request) -> Response:
    """A token that uploads files for an hour."""
    _, secret = await uploader_of(request)
    until = datetime.now(UTC) + timedelta(seconds=CDN_TOKEN_S - 60)  # so that no client begins an upload with its last second
    base_url = files_base(request.scope, settings_of(request).public_url)
    body = {"token": issue_cdn_token(secret), "token_type": "Bearer", "base_url": base_url, "expires_at": until.isoformat()}
    return JSONResponse(body, headers=NO_STORE)


@files.post("/upload")
async def upload(request: Request) -> Response:
    """Stores a file, with a token for the CDN. Its name is in `X-Fal-File-Name`."""
    caller, _ = await uploader_of(request, cdn=True)
    ticket = await _begin(request, caller, _described(request, _declared_size(request, settings_of(request).uploads.max_bytes)))
    await _store(request, ticket)
    return JSONResponse({"access_url": _url(request, ticket)}, headers=NO_STORE)


@files.post("/upload/multipart")
async def begin_multipart(request: Request) -> Response:
    """Begins a file in parts, with a token for the CDN."""
    caller, secret = await uploader_of(request, cdn=True)
    ticket = await _begin(request, caller, _described(request, None))
    body = {"access_url": _url(request, ticket), "uploadId": _signature(request, secret, ticket)}
    return JSONResponse(body, headers=NO_STORE)


@files.put("/b/{folder}/{file}")
async def put(request: Request, folder: str, file: str, upload: str = "") -> Response:
    """Stores the file that an upload URL is for. Sending the same again is answered in the same way."""
    ticket = await _ticket(request, folder, file, upload)
    if not same_type(media_type(request.headers.get("content-type") or ticket.content_type), ticket.content_type):
        raise Forbidden(f"This upload URL is for a file of type {ticket.content_type}.")
    etag = await _store(request, ticket)
    return JSONResponse({}, headers={"etag": f'"{etag}"'})


@files.put("/b/{folder}/{file}/{number}")
async def put_part(request: Request, folder: str, file: str, number: str, upload: str = "") -> Response:
    """Stores a part of a file. It takes the place of one with the same number."""
    return await _store_part(request, await _ticket(request, folder, file, upload), number)


@files.post("/b/{folder}/{file}/complete")
async def complete(request: Request, folder: str, file: str, upload: str = "") -> Response:
    """Makes a file of the parts named."""
    return await _complete(request, await _ticket(request, folder, file, upload))


@files.put("/b/{folder}/{file}/multipart/{upload_id}/{number}")
async def put_cdn_part(request: Request, folder: str, file: str, upload_id: str, number: str) -> Response:
    """The same with a token for the CDN."""
    return await _store_part(request, await _cdn_ticket(request, folder, file, upload_id), number)


@files.post("/b/{folder}/{file}/multipart/{upload_id}/complete")
async def complete_cdn(request: Request, folder: str, file: str, upload_id: str) -> Response:
    """The same with a token for the CDN."""
    return await _complete(request, await _cdn_ticket(request, folder, file, upload_id))


def _described(request: Request, size: int | None) -> UploadRequest:
    """What the headers of a file say about it."""
    content_type = media_type(request.headers.get("content-type"))
    file_name = request.headers.get("x-fal-file-name", "upload.bin")[:MAX_NAME_CHARS]
    return UploadRequest(content_type=content_type, file_name=file_name, file_size=size)


async def _begin(request: Request, caller: Caller, asked: UploadRequest, *, direct: bool = False) -> Ticket:
    """Lists a new upload and says what it may be. Raises `TooManyRequests`, `BodyTooLarge`."""
    settings = settings_of(request)
    limit = settings.uploads.max_bytes
    if asked.file_size is not None and asked.file_size > limit:
        raise BodyTooLarge(f"A file may have {limit} bytes.")
    lifecycle = _lifecycle(request.headers)
    name = files_of(request).new_listed_name(asked.file_name, asked.content_type)
    reserved = asked.file_size if asked.file_size is not None else min(DIRECT_BYTES, limit) if direct else 0
    await store_of(request).uploads.begin(
        name,
        owner=caller.owner,
        content_type=asked.content_type,
        open_s=2 * _open_s(request, direct=direct),
        keep_s=settings.retention.keep_file_s(lifecycle.keep_s),
        access=lifecycle.access.model_dump() if lifecycle.access else None,
        quota=settings.quotas.stored_bytes,
        size=reserved,
        arriving=files_of(request).arriving(name) if direct else None,
    )
    exact = asked.file_size is not None
    return Ticket(name, asked.content_type, reserved if exact else limit, exact, caller.owner)


def _open_s(request: Request, *, direct: bool) -> float:
    open_s = settings_of(request).uploads.open_s
    return min(open_s, DIRECT_S) if direct else open_s


def _lifecycle(headers: Mapping[str, str]) -> Lifecycle:
    for name in ("X-Fal-Object-Lifecycle", "X-Fal-Object-Lifecycle-Preference"):
        if (value := headers.get(name)) is not None:
            return read_lifecycle(value, name)
    return Lifecycle()


def _url(request: Request, ticket: Ticket) -> str:
    return f"{files_base(request.scope, settings_of(request).public_url)}/files/{ticket.name}"


def _signature(request: Request, secret: KeySecret, ticket: Ticket) -> str:
    return issue_ticket(secret, ticket, int(settings_of(request).uploads.open_s))


async def _ticket(request: Request, folder: str, file: str, signature: str) -> Ticket:
    """What a signature is good for, at the path of its file. Raises `Forbidden`."""
    ticket = await ticket_in(request, signature)
    if ticket.name != f"b/{folder}/{file}":
        raise Forbidden("This is the upload URL of another file.")
    return ticket


async def _cdn_ticket(request: Request, folder: str, file: str, upload_id: str) -> Ticket:
    """The same for a caller with a token, which must be of the key that began the upload."""
    caller, _ = await uploader_of(request, cdn=True)
    ticket = await _ticket(request, folder, file, upload_id)
    if ticket.owner != caller.owner:
        raise NotFound("There is no such upload.")
    return ticket


async def _store(request: Request, ticket: Ticket) -> str:
    """Stores the body as the file; returns its SHA-256 in hexadecimal. One that is the same again changes nothing.

    The file is listed as complete before it can be read, so of several bodies that come at once, one wins. If this process is
    killed in between, there is no file yet, and the same body stores it.
    """
    size = _declared_size(request, ticket.max_bytes)
    if ticket.exact and size != ticket.max_bytes:
        raise Forbidden(f"This upload is of {ticket.max_bytes} bytes.")

    async def finish(digest: bytes) -> None:
        await _finish(request, ticket, digest, size)

    return (await _receive(request, ticket, ticket.name, size, finish)).hex()


async def _store_part(request: Request, ticket: Ticket, number: str) -> Response:
    if not (number.isascii() and number.isdecimal() and len(number) < 6 and 1 <= int(number) <= MAX_PARTS):
        raise BadRequest(f"Parts are numbered from 1 to {MAX_PARTS}.")
    size = _declared_size(request, ticket.max_bytes)
    part = files_of(request).part_name(ticket.name, int(number))
    digest = await _receive(request, ticket, part, size)
    if not await store_of(request).uploads.finish_part(part, digest, size):
        await files_of(request).delete(part)
        raise UploadIsOver
    # the JavaScript client reads the body, the Python client the header
    return JSONResponse({"partNumber": int(number), "etag": digest.hex()}, headers={"etag": f'"{digest.hex()}"'})


async def _receive(
    request: Request, ticket: Ticket, piece: str, size: int, approve: Callable[[bytes], Awaitable[None]] | None = None
) -> bytes:
    """Stores the body as `piece`, the file or one of its parts, within what its owner may have; returns its SHA-256."""
    uploads, settings, files = store_of(request).uploads, settings_of(request), files_of(request)
    open_s, body = settings.uploads.open_s, request.stream()
    with quotas_of(request).upload(ticket.owner):
        quota = settings.quotas.stored_bytes
        complete = await uploads.reserve(ticket.name, piece, size, max_bytes=ticket.max_bytes, quota=quota)
        if complete is not None and piece != ticket.name:
            raise UploadIsComplete
        if complete is not None and await files.size(ticket.name) is not None:
            if await digest_of(body, size, open_s) != complete:
                raise UploadIsComplete
            return complete
        try:
            return await receive(files, piece, body, size, open_s, approve)
        except BaseException:
            await asyncio.shield(uploads.release(piece))
            raise


async def _complete(request: Request, ticket: Ticket) -> Response:
    """Makes a file of the parts named.

    The list is kept before the file can be read, so of several lists that come at once, one wins. If this process is killed in
    between, there is no file yet, and the same list makes it.
    """
    uploads, files = store_of(request).uploads, files_of(request)
    listed = (await _parsed(request, UploadedParts, MAX_PARTS_BYTES)).in_order()
    names = [files.part_name(ticket.name, part.partNumber) for part in listed]
    digests = [_digest(part.etag) for part in listed]
    whole = hashlib.sha256(b"".join(digests)).digest()
    exact = ticket.max_bytes if ticket.exact else None
    missing = await uploads.finish_parts(ticket.name, whole, names, digests, exact)
    if missing is not None:
        number = listed[missing].partNumber
        raise BadRequest(f"Part {number} has not been uploaded, or is not the one with this etag.")
    async with _assembling.setdefault(ticket.name, asyncio.Lock()):
        if await files.size(ticket.name) is None:
            sizes = await uploads.part_sizes(ticket.name)
            try:
                await assemble(files, ticket.name, names, [sizes.get(name, 0) for name in names])
            except StorageFailed:  # or another process has made it, and the parts are gone
                if await files.size(ticket.name) is None:
                    raise
            await uploads.drop_parts(ticket.name)
    return JSONResponse({"access_url": _url(request, ticket)}, headers={"etag": f'"{whole.hex()}"'})


def _digest(etag: str) -> bytes:
    """The SHA-256 that a part's etag is; empty if it is none."""
    text = etag.strip('"')
    return bytes.fromhex(text) if _SHA256.fullmatch(text) else b""


async def _finish(request: Request, ticket: Ticket, digest: bytes, size: int) -> None:
    """Lists the file as complete. Raises `UploadIsComplete` if it was with other bytes, `UploadIsOver`."""
    uploads = store_of(request).uploads
    if not await uploads.finish(ticket.name, digest, size):
        raise UploadIsOver if await uploads.find(ticket.name) is None else UploadIsComplete


def _declared_size(request: Request, most: int) -> int:
    """How long the body is. Raises `LengthRequired`, `BodyTooLarge`."""
    declared = request.headers.get("content-length", "")
    if not (declared.isascii() and declared.isdecimal()):
        raise LengthRequired
    if len(declared) > MAX_DIGITS or int(declared) > most:
        raise BodyTooLarge(f"This upload may have {most} bytes.")
    return int(declared)


async def _parsed(request: Request, model: type[M], max_bytes: int) -> M:
    """The JSON of a request. Raises `InvalidBody`, `BadRequest`."""
    body = await read_body(request, max_bytes)
    if body.count(b"{") > MAX_PARTS + 1:  # pydantic would look at each before it counts them, for a quarter of a second
        raise BadRequest(f"A file has at most {MAX_PARTS} parts.")
    try:
        return model.model_validate_json(body or b"{}")
    except ValidationError as exc:
        raise InvalidBody(exc) from None
