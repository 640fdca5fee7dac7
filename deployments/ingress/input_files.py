"""The files of a submission that are in the file store, or go there: its job's row holds only references to them.

Large data URIs become files, so a claim and a poll cost the same whatever the input was. Such a file belongs to its job and
expires with the job's end. A URL of a file that this service has itself is never fetched: the file is read from the store, if the
caller may read it. It is known by its own name, which nobody can guess: the service does not know all the names of its host.
"""

import asyncio
from dataclasses import replace
from urllib.parse import unquote, urlsplit

from pydantic import ValidationError
from pydantic_core import InitErrorDetails
from starlette.requests import HTTPConnection

from deployments.files.download import Refused, TooLarge, decoded_data_uri, told_to_caller
from deployments.files.file_store import is_served
from deployments.ingress.access import Caller
from deployments.ingress.body import INLINE_BYTES, SplitBody, unescaped
from deployments.ingress.request_context import bodies_of, files_of, settings_of, store_of
from deployments.ingress.routes.file_routes import readable
from deployments.ingress.target_routing import CDN_HOST
from deployments.jobs.job import NewJob
from deployments.schemas.inputs import KEPT, EndpointInput
from deployments.settings import FetchSettings
from engines.errors import Forbidden

UNCLAIMED_S = 3600.0
"""How long a file is kept whose job was not stored after it, in seconds."""


def check_places(job_input: EndpointInput, body: SplitBody) -> None:
    """Raises pydantic's `ValidationError` for a text, e.g. a prompt, that is as long as a file and looks like a data URI."""
    media = job_input.media()
    texts = [field for field, value in job_input if field not in media and isinstance(value, str) and value in body.uris]
    if texts:
        faults = [
            InitErrorDetails(type="string_too_long", loc=(field,), input=None, ctx={"max_length": INLINE_BYTES})
            for field in texts
        ]
        raise ValidationError.from_exception_data("input", faults)


async def with_input(
    connection: HTTPConnection, caller: Caller, new: NewJob, job_input: EndpointInput, body: SplitBody
) -> NewJob:
    """The job with its input, whose large files are stored.

    Raises `ModelError` for a data URI that is none and for a file of ours that the caller may not read; `StorageFailed`.
    """
    files, store, limits = files_of(connection), store_of(connection), settings_of(connection).fetch
    media = job_input.media()
    own = {field: name for field, url in media.items() if (name := await _own_file(connection, caller, field, url)) is not None}
    uris = {field: body.uris[url] for field, url in media.items() if url in body.uris}
    names = {field: files.new_input() for field in uris}
    for field, name in names.items():
        async with bodies_of(connection).turn:
            data = await asyncio.to_thread(_decoded, uris[field], field, limits)
        await store.retention.add_file(name, UNCLAIMED_S, new.owner, len(data))
        await files.put_input(name, data)
    referring = job_input.model_copy(update={field: KEPT + name for field, name in (own | names).items()})
    return replace(new, input=referring.model_dump(mode="json", exclude_none=True), files=tuple(names.values()))


async def _own_file(connection: HTTPConnection, caller: Caller, field: str, url: str) -> str | None:
    """The name of the file at a URL, if it is one of this service's. Raises `ModelError` if the caller may not read it."""
    try:
        parts = urlsplit(url)
        name = unquote(parts.path).rpartition("/files/")[2]
        if parts.scheme.lower() not in ("http", "https") or not is_served(name):
            return None
        host = parts.netloc.rpartition("@")[2].lower()
    except ValueError:  # whatever it is, it is not ours
        return None
    limits = settings_of(connection).fetch
    with told_to_caller(limits, ("body", field)):
        try:
            found = await readable(connection, name, caller)
        except Forbidden as exc:
            raise Refused("its owner does not let this key read it.") from exc
        if found is None and host in _own_hosts(connection):
            raise Refused("there is no such file.")
        if found is not None and found.size > limits.max_bytes:
            raise TooLarge
    return name if found else None


def _own_hosts(connection: HTTPConnection) -> set[str]:
    public_url = settings_of(connection).public_url
    return {connection.headers.get("host", "").lower(), urlsplit(public_url or "").netloc.lower(), CDN_HOST}


def _decoded(uri: memoryview, field: str, limits: FetchSettings) -> bytearray:
    with told_to_caller(limits, ("body", field)):
        return decoded_data_uri(unescaped(uri), limits.max_bytes)
