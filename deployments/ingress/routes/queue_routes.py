"""fal's queue: submit, status, result and cancel, as reads and writes of the job store. Answers: `schemas/responses.py`."""

from collections.abc import Collection

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse

from deployments.ingress.access import caller_of, job_of
from deployments.ingress.body import split
from deployments.ingress.middleware import failure_response
from deployments.ingress.new_jobs import accept
from deployments.ingress.request_context import TextRoute, UnknownRequest, bodies_of, json_answer, settings_of, store_of
from deployments.ingress.target_routing import queue_base, service_base
from deployments.jobs.job import JobState
from deployments.jobs.keys import Scope
from deployments.schemas import responses
from deployments.schemas.endpoint import ENDPOINTS, Endpoint
from deployments.schemas.failures import Failure
from deployments.schemas.submission import is_set, read_options
from engines.errors import BadRequest

router = APIRouter(prefix="/queue", route_class=TextRoute, include_in_schema=False)  # `schemas/openapi.py` describes them


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
        include_in_schema=False,
    )


async def _submit(request: Request, endpoint: Endpoint) -> Response:
    """Checks a submission, writes its job, then answers with the job's id."""
    caller = await caller_of(request, endpoint.id)
    caller.require(Scope.SUBMIT)
    options = read_options(request.headers, request.query_params)  # before the body, which may be megabytes
    async with bodies_of(request).read(request, settings_of(request).max_body_bytes) as body:
        accepted = await accept(request, endpoint, caller, options, await split(body))
    if isinstance(accepted, Failure):
        return failure_response(accepted)
    request.state.request_id = str(accepted.job.id)
    queue_url = queue_base(request.scope, settings_of(request).public_url)
    return json_answer(responses.submitted(accepted.job, queue_url), 200, accepted.headers)


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
