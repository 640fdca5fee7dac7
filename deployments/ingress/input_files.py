"""The large data URIs of a submission become files in the file store; its job's row holds only references to them.

So a claim and a poll cost the same whatever the input was. A file belongs to its job and expires with the job's end.
"""

import asyncio
from dataclasses import replace

from pydantic import ValidationError
from pydantic_core import InitErrorDetails

from deployments.files.download import decoded_data_uri, told_to_caller
from deployments.files.file_store import FileStore
from deployments.ingress.body import INLINE_BYTES, SplitBody, unescaped
from deployments.jobs.job import NewJob
from deployments.jobs.store import JobStore
from deployments.schemas.inputs import KEPT, EndpointInput
from deployments.settings import FetchSettings

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
    new: NewJob, job_input: EndpointInput, body: SplitBody, files: FileStore, store: JobStore, limits: FetchSettings
) -> NewJob:
    """The job with its input, whose large files are stored. Raises `ModelError` for a data URI that is none, `StorageFailed`."""
    uris = {field: body.uris[url] for field, url in job_input.media().items() if url in body.uris}
    names = {field: files.new_input() for field in uris}
    for field, name in names.items():
        data = await asyncio.to_thread(_decoded, uris[field], field, limits)
        await store.retention.add_file(name, UNCLAIMED_S, new.owner, len(data))
        await files.put_input(name, data)
    referring = job_input.model_copy(update={field: KEPT + name for field, name in names.items()})
    return replace(new, input=referring.model_dump(mode="json", exclude_none=True), files=tuple(names.values()))


def _decoded(uri: memoryview, field: str, limits: FetchSettings) -> bytearray:
    with told_to_caller(limits, ("body", field)):
        return decoded_data_uri(unescaped(uri), limits.max_bytes)
