"""From the body of a submission to a stored job, whichever way it came: by the queue, a run, a stream or a WebSocket.

`schemas/` defines the inputs, `schemas/submission.py` the options of a submission.
"""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from urllib.parse import quote

from pydantic import ValidationError
from starlette.requests import HTTPConnection

from deployments import metrics, tracing
from deployments.ingress.access import Caller
from deployments.ingress.body import SplitBody
from deployments.ingress.input_files import check_places, with_input
from deployments.ingress.request_context import quotas_of, settings_of, store_of
from deployments.ingress.target_routing import service_base
from deployments.jobs.database import StoreAway
from deployments.jobs.job import Idempotency, Job, NewJob
from deployments.schemas.endpoint import Endpoint
from deployments.schemas.failures import Failure, error_failure, request_failure, validation_failure
from deployments.schemas.inputs import EndpointInput
from deployments.schemas.submission import SubmissionOptions, fingerprint
from engines.errors import ModelError, QueueFull, RequestError, ValueTooLarge

logger = logging.getLogger(__name__)

IGNORED_FIELDS_HEADER = "x-reelray-ignored-fields"
"""Of the answer to a submission: the names of fields that the endpoint does not have, percent-encoded."""
IGNORED_HEADERS_HEADER = "x-reelray-ignored-headers"
"""The same for fal's headers: those of the submission that have no effect here."""

TRACE_HEADER = "x-reelray-trace-id"
"""The id of the job's trace: what to look for in logs and traces, and in the webhook's `traceparent`."""


@dataclass(frozen=True)
class Accepted:
    """A stored job. input: None for the job of a submission that this one repeats. headers: for the answer."""

    job: Job
    input: EndpointInput | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


async def accept(
    connection: HTTPConnection, endpoint: Endpoint, caller: Caller, options: SubmissionOptions, body: SplitBody
) -> Accepted | Failure:
    """Checks a submission and stores its job; a failure is what its caller is answered. Raises `RequestError`.

    The job is in the trace of the caller's `traceparent` header; without a valid one it begins a trace.
    """
    with tracing.span("submit", connection.headers.get("traceparent"), begins=True, endpoint=endpoint.id):
        accepted = await _accept(connection, endpoint, caller, options, body)
    if isinstance(accepted, Failure) or accepted.job.traceparent is None:
        return accepted
    return replace(accepted, headers={**accepted.headers, TRACE_HEADER: tracing.trace_id(accepted.job.traceparent)})


async def _accept(
    connection: HTTPConnection, endpoint: Endpoint, caller: Caller, options: SubmissionOptions, body: SplitBody
) -> Accepted | Failure:
    settings, size = settings_of(connection), body.size_bytes
    new = await _new_job(connection, endpoint, caller, options, body)
    try:
        parsed = endpoint.input.parse(body.fields, refuse_unknown=settings.unknown_fields == "refuse")
        check_places(parsed.input, body)
        parsed.input.check_memory(settings.config_of(endpoint))
    except ValidationError as exc:
        return await _reject(connection, new, validation_failure(exc))
    except ValueTooLarge as exc:
        return await _reject(connection, new, error_failure(exc))
    refusal = await _refusal(connection, new, options.max_queue_length, size)
    # a repeat adds no job, and its caller needs the job's id
    if (refusal is not None or body.uris) and (job := await store_of(connection).repeated(new)) is not None:
        return Accepted(job)
    if refusal is not None:
        raise refusal
    resolved = parsed.input.resolved()
    try:
        new = await with_input(connection, caller, new, resolved, body)
    except ModelError as exc:  # a data URI that is none, or a file that the caller may not read
        if (job := await store_of(connection).repeated(new)) is not None:
            return Accepted(job)
        return await _reject(connection, new, error_failure(exc))
    work = resolved.demand()
    stored = await _write(connection, replace(new, notes=parsed.notes, units=work.units, parallel=work.parallel))
    if isinstance(stored, Failure):
        return stored
    quotas_of(connection).accepted(new.owner, size)
    told = {IGNORED_FIELDS_HEADER: parsed.ignored, IGNORED_HEADERS_HEADER: options.ignored}
    return Accepted(stored.job, resolved, {name: ", ".join(map(quote, names)) for name, names in told.items() if names})


async def _reject(connection: HTTPConnection, new: NewJob, failure: Failure) -> Accepted | Failure:
    """The answer to an input that was refused. With a webhook there must be a job: only a job sends one."""
    return failure if new.webhook_url is None else await _write(connection, new, failure)


async def _new_job(
    connection: HTTPConnection, endpoint: Endpoint, caller: Caller, options: SubmissionOptions, body: SplitBody
) -> NewJob:
    """The job, still without its input."""
    settings, once = settings_of(connection), None
    if options.idempotency_key is not None:
        digest = fingerprint(endpoint.id, await asyncio.to_thread(body.digest_fields))
        once = Idempotency(options.idempotency_key, digest, settings.queue.idempotency_s)
    return NewJob(
        endpoint=endpoint.id,
        input={},
        owner=caller.owner,
        priority=options.priority,
        start_timeout_s=options.start_timeout_s,
        max_attempts=1 if options.no_retry else settings.queue.max_attempts,
        retries=options.retries,
        webhook_url=options.webhook_url,
        idempotency=once,
        files_s=options.files_s,
        files_access=options.files_access.model_dump() if options.files_access else None,
        store_io=options.store_io,
        service_url=options.webhook_url and service_base(connection.scope, settings.public_url),
        traceparent=tracing.current(),
    )


async def _refusal(connection: HTTPConnection, new: NewJob, limit: int | None, size: int) -> RequestError | None:
    """Why another job with files of `size` bytes is not queued: more than `limit` jobs wait already, or it exceeds a quota."""
    store = store_of(connection)
    if limit is not None and await store.queued(new.endpoint, at_most=limit + 1) > limit:
        return QueueFull(f"More than {limit} requests are waiting already.")
    return await quotas_of(connection).refusal(store, new.owner, size)


async def _write(connection: HTTPConnection, new: NewJob, failure: Failure | None = None) -> Accepted | Failure:
    """Stores the job. failure: of an input that was refused; the job is then stored as failed."""
    store = store_of(connection)
    try:
        job = await (store.submit(new) if failure is None else store.submit_failed(new, failure))
    except StoreAway:
        # The job may have been committed although the database's answer was lost. On 503 the JavaScript client would submit
        # again, as a new job, and the GPUs would render twice; on 500 neither client repeats a submission.
        logger.exception("it is unknown whether a job was stored", extra={"action": "submit_unknown", "endpoint": new.endpoint})
        detail = "The service failed while it queued the request, which may or may not run."
        return request_failure(500, "internal_error", detail)
    metrics.SUBMITTED.record(endpoint=new.endpoint)
    logger.info("job submitted", extra={"action": "submit", "job_id": str(job.id), "endpoint": new.endpoint})
    return Accepted(job)
