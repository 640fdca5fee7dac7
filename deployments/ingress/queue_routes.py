"""fal's queue: submit, status, result and cancel, as reads and writes of the job store.

`schemas/` defines the inputs, `schemas/submission.py` the options of a submission, `schemas/responses.py` the answers.
"""

import asyncio
import logging
from collections.abc import Collection
from dataclasses import replace
from urllib.parse import quote

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import ValidationError

from deployments.ingress.access import Caller, caller_of, job_of
from deployments.ingress.body import SplitBody, split
from deployments.ingress.input_files import check_places, with_input
from deployments.ingress.middleware import failure_response
from deployments.ingress.request_context import (
    TextRoute,
    UnknownRequest,
    bodies_of,
    json_answer,
    quotas_of,
    settings_of,
    store_of,
)
from deployments.ingress.target_routing import queue_base, service_base
from deployments.jobs.database import StoreAway
from deployments.jobs.job import Idempotency, Job, JobState, NewJob
from deployments.jobs.keys import Scope
from deployments.schemas import responses
from deployments.schemas.endpoint import ENDPOINTS, Endpoint
from deployments.schemas.failures import Failure, error_failure, request_failure, validation_failure
from deployments.schemas.submission import SubmissionOptions, fingerprint, is_set, read_options
from engines.errors import BadRequest, ModelError, QueueFull, RequestError

logger = logging.getLogger(__name__)

IGNORED_HEADER = "x-reelray-ignored-fields"
"""Of the answer to a submission: the names of fields that the endpoint does not have, percent-encoded."""

router = APIRouter(prefix="/queue", tags=["queue"], route_class=TextRoute)


def add_submit_routes(app: FastAPI, models: Collection[str]) -> None:
    """A route for each endpoint whose model is among `models`."""
    for endpoint in ENDPOINTS.values():
        if endpoint.model in models:
            _add_submit_route(app, endpoint)


def _add_submit_route(app: FastAPI, endpoint: Endpoint) -> None:
    async def submit(request: Request) -> Response:
        return await _submit(request, endpoint)

    app.router.add_api_route(f"/queue/{endpoint.id}/", submit, methods=["POST"], include_in_schema=False)
    app.router.add_api_route(
        f"/queue/{endpoint.id}",
        submit,
        route_class_override=TextRoute,
        methods=["POST"],
        tags=["queue"],
        summary=endpoint.id,
        description=endpoint.input.__doc__ or "",
        openapi_extra={"requestBody": {"content": {"application/json": {"schema": endpoint.input.model_json_schema()}}}},
    )


async def _submit(request: Request, endpoint: Endpoint) -> Response:
    """Checks a submission, writes its job, then answers with the job's id."""
    caller = await caller_of(request, endpoint.id)
    caller.require(Scope.SUBMIT)
    options = read_options(request.headers, request.query_params)  # before the body, which may be megabytes
    async with bodies_of(request).read(request, settings_of(request).max_body_bytes) as body:
        return await _queue(request, endpoint, caller, options, await split(body))


async def _queue(request: Request, endpoint: Endpoint, caller: Caller, options: SubmissionOptions, body: SplitBody) -> Response:
    settings, size = settings_of(request), body.size_bytes
    new = await _new_job(request, endpoint, caller, options, body)
    try:
        parsed = endpoint.input.parse(body.fields, refuse_unknown=settings.unknown_fields == "refuse")
        check_places(parsed.input, body)
    except ValidationError as exc:
        return await _reject(request, new, validation_failure(exc))
    refusal = await _refusal(request, new, options.max_queue_length, size)
    # a repeat adds no job, and its caller needs the job's id
    if (refusal is not None or body.uris) and (job := await store_of(request).repeated(new)) is not None:
        return _answer(request, job)
    if refusal is not None:
        raise refusal
    try:
        new = await with_input(request, caller, new, parsed.input.resolved(), body)
    except ModelError as exc:  # a data URI that is none, or a file that the caller may not read
        if (job := await store_of(request).repeated(new)) is not None:
            return _answer(request, job)
        return await _reject(request, new, error_failure(exc))
    answer = await _write(request, replace(new, notes=parsed.notes))
    quotas_of(request).accepted(new.owner, size)
    if parsed.ignored:
        answer.headers[IGNORED_HEADER] = ", ".join(map(quote, parsed.ignored))
    return answer


async def _reject(request: Request, new: NewJob, failure: Failure) -> Response:
    """The answer to an input that was refused. With a webhook there must be a job: only a job sends one."""
    return failure_response(failure) if new.webhook_url is None else await _write(request, new, failure)


async def _new_job(request: Request, endpoint: Endpoint, caller: Caller, options: SubmissionOptions, body: SplitBody) -> NewJob:
    """The job, still without its input."""
    settings, once = settings_of(request), None
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
        webhook_url=options.webhook_url,
        idempotency=once,
        files_s=options.files_s,
        files_access=options.files_access.model_dump() if options.files_access else None,
        store_io=options.store_io,
        service_url=options.webhook_url and service_base(request.scope, settings.public_url),
    )


async def _refusal(request: Request, new: NewJob, limit: int | None, size: int) -> RequestError | None:
    """Why another job with files of `size` bytes is not queued: more than `limit` jobs wait already, or it exceeds a quota."""
    store = store_of(request)
    if limit is not None and await store.queued(new.endpoint, at_most=limit + 1) > limit:
        return QueueFull(f"More than {limit} requests are waiting already.")
    return await quotas_of(request).refusal(store, new.owner, size)


async def _write(request: Request, new: NewJob, failure: Failure | None = None) -> Response:
    """Stores the job, then answers. failure: of an input that was refused; the job is then stored as failed."""
    store = store_of(request)
    try:
        job = await (store.submit(new) if failure is None else store.submit_failed(new, failure))
    except StoreAway:
        # The job may have been committed although the database's answer was lost. On 503 the JavaScript client would submit
        # again, as a new job, and the GPUs would render twice; on 500 neither client repeats a submission.
        logger.exception("it is unknown whether a job was stored", extra={"action": "submit_unknown", "endpoint": new.endpoint})
        detail = "The service failed while it queued the request, which may or may not run."
        return failure_response(request_failure(500, "internal_error", detail))
    logger.info("job submitted", extra={"action": "submit", "job_id": str(job.id), "endpoint": new.endpoint})
    return _answer(request, job)


def _answer(request: Request, job: Job) -> Response:
    request.state.request_id = str(job.id)
    return json_answer(responses.submitted(job, queue_base(request.scope, settings_of(request).public_url)), 200)


@router.get("/{app:path}/requests/{request_id}/status")
async def status(request: Request, app: str, request_id: str, logs: str = "0") -> Response:
    """A request's status, with all its log lines so far if logs is 1 or true. 202 until it is completed, then 200."""
    with_logs = is_set(logs)
    job = await job_of(request, app, request_id, Scope.READ, 0 if with_logs else None)
    body = responses.status(job, job.lines if with_logs else None, queue_base(request.scope, settings_of(request).public_url))
    return json_answer(body, 200 if job.state.ended else 202)


@router.get("/{app:path}/requests/{request_id}")
@router.get("/{app:path}/requests/{request_id}/response")
async def result(request: Request, app: str, request_id: str) -> Response:
    """The output of a completed request, or its error. 400 until it is completed, because clients take any 2xx for the output."""
    job = await job_of(request, app, request_id, Scope.READ)
    if not job.state.ended:
        raise BadRequest("Request is still in progress")
    if failure := responses.failure_of(job):
        return failure_response(failure)
    return JSONResponse(responses.with_absolute_urls(job.result, service_base(request.scope, settings_of(request).public_url)))


@router.put("/{app:path}/requests/{request_id}/cancel")
async def cancel(request: Request, app: str, request_id: str) -> Response:
    """Takes a waiting request out of the queue, and asks a running one to stop. A repeated call gets the same answer."""
    job = await job_of(request, app, request_id, Scope.SUBMIT)
    found = await store_of(request).request_cancel(job.id)
    if found is None:
        raise UnknownRequest
    if found.ended and found is not JobState.CANCELLED:
        return JSONResponse({"status": "ALREADY_COMPLETED"}, 400)
    return JSONResponse({"status": "CANCELLATION_REQUESTED"}, 202)
