"""/run: fal's direct calls. Their jobs are those of the queue: they survive crashes and can be followed there by their ids.

A caller that hangs up cancels its job, as at fal. Not if the submission has an `Idempotency-Key` or a webhook: then somebody
still wants the output, and under the same key the caller gets it later.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import suppress
from dataclasses import replace
from typing import Any
from uuid import UUID

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from pydantic_core import to_json
from starlette.requests import HTTPConnection
from starlette.types import Receive, Send
from starlette.types import Scope as AsgiScope

from deployments.ingress.access import Caller, caller_of
from deployments.ingress.body import SplitBody, split
from deployments.ingress.middleware import failure_response
from deployments.ingress.new_jobs import Accepted, accept
from deployments.ingress.request_context import TextRoute, bodies_of, json_answer, quotas_of, settings_of, store_of
from deployments.ingress.target_routing import service_base
from deployments.jobs.database import StoreAway, patiently
from deployments.jobs.job import Job
from deployments.jobs.keys import Scope
from deployments.jobs.store import JobStore
from deployments.schemas import responses
from deployments.schemas.endpoint import ENDPOINTS, Endpoint
from deployments.schemas.failures import Failure
from deployments.schemas.submission import SubmissionOptions, read_options
from engines.errors import Cancelled, Forbidden, RunTimeout

logger = logging.getLogger(__name__)

LOOK_AGAIN_S = 5.0
"""How long to wait for a notification of a job's end before looking anyway."""
HEARTBEAT_S = 3.0
"""After this long without an event a stream sends a comment, to keep the connection open."""
REPEATED = (502, 503, 504)
"""Codes on which the JavaScript client sends a direct call again."""
OPTIONS_IN_QUERY = ("fal_webhook", "fal_max_queue_length", "fal_jwt_token")


def add_run_routes(app: FastAPI, models: Collection[str]) -> None:
    """Routes for each endpoint whose model is among `models`."""
    for endpoint in ENDPOINTS.values():
        if endpoint.model in models:
            _add(app, f"/run/{endpoint.id}", endpoint, _run)
            _add(app, f"/run/{endpoint.id}/stream", endpoint, _stream)


def _add(app: FastAPI, path: str, endpoint: Endpoint, answer: Callable[[Request, Endpoint], Awaitable[Response]]) -> None:
    async def route(request: Request) -> Response:
        return await answer(request, endpoint)

    # `schemas/openapi.py` describes them
    methods = ["POST", "GET"]
    app.router.add_api_route(path, route, route_class_override=TextRoute, methods=methods, include_in_schema=False)
    app.router.add_api_route(f"{path}/", route, methods=methods, include_in_schema=False)


async def _run(request: Request, endpoint: Endpoint) -> Response:
    """Submits a job and answers with its output."""
    caller = await _caller(request, endpoint)
    options = read_options(request.headers, request.query_params)
    with quotas_of(request).stream(caller.owner):
        accepted = await _accepted(request, endpoint, caller, options)
        if isinstance(accepted, Failure):
            return failure_response(accepted)
        job = await _until_end(request, accepted.job, leaves=_is_left(options))
    if failure := responses.failure_of(job):
        return failure_response(_final(failure), accepted.headers)
    return json_answer(output_of(request, job), 200, accepted.headers)


def _final(failure: Failure) -> Failure:
    """A failure whose code does not make a client repeat the call, which would render again."""
    repeated = failure.status in REPEATED and "X-Fal-Request-Timeout-Type" not in failure.headers
    return replace(failure, status=500) if repeated else failure


async def _stream(request: Request, endpoint: Endpoint) -> Response:
    """Submits a job and answers with server-sent events: its progress, then its output."""
    caller = await _caller(request, endpoint)
    options = read_options(request.headers, request.query_params)
    quotas_of(request).check_stream(caller.owner)  # before there is a job
    accepted = await _accepted(request, endpoint, caller, options)
    if isinstance(accepted, Failure):
        return failure_response(accepted)
    headers = {"cache-control": "no-store", "x-accel-buffering": "no", **accepted.headers}
    return _EventStream(request, endpoint, caller, accepted, leaves=_is_left(options), headers=headers)


async def _caller(request: Request, endpoint: Endpoint) -> Caller:
    if request.method == "GET" and _is_strangers_picture(request):
        raise Forbidden("Web pages may not load this as a part of theirs.")
    caller = await caller_of(request, endpoint.id)
    caller.require(Scope.SUBMIT)
    return caller


def _is_strangers_picture(request: Request) -> bool:
    """Whether a page of another site loads this as a picture or follows it as a link: a browser does that without asking, and an
    open service would render. What fal's client sends has a content type for which a browser asks first.
    """
    site = request.headers.get("sec-fetch-site", "none")
    return site not in ("none", "same-origin") and request.headers.get("content-type") != "application/json"


async def _accepted(request: Request, endpoint: Endpoint, caller: Caller, options: SubmissionOptions) -> Accepted | Failure:
    if request.method == "GET":  # the JavaScript client puts the input into the query, all of it as text
        given = {name: value for name, value in request.query_params.items() if name not in OPTIONS_IN_QUERY}
        body = bytearray(to_json(endpoint.input.of_query(given)))
        accepted = await accept_or_give_up(request, endpoint, caller, options, await split(body))
    else:
        async with bodies_of(request).read(request, settings_of(request).max_body_bytes) as body:
            accepted = await accept_or_give_up(request, endpoint, caller, options, await split(body))
    if isinstance(accepted, Accepted):
        request.state.request_id = str(accepted.job.id)
    return accepted


async def accept_or_give_up(
    connection: HTTPConnection, endpoint: Endpoint, caller: Caller, options: SubmissionOptions, body: SplitBody
) -> Accepted | Failure:
    """`accept` for a caller who waits: if this task is cancelled, as the caller has hung up, no job is left that nobody wants."""
    submitting = asyncio.ensure_future(accept(connection, endpoint, caller, options, body))
    try:
        return await asyncio.shield(submitting)
    except asyncio.CancelledError:
        with suppress(Exception):
            accepted = await submitting
            if isinstance(accepted, Accepted) and not _is_left(options):
                await give_up(store_of(connection), accepted.job.id)
        raise


def _is_left(options: SubmissionOptions) -> bool:
    return options.idempotency_key is not None or options.webhook_url is not None


async def _until_end(request: Request, job: Job, *, leaves: bool) -> Job:
    """The job when it has ended. Raises `RunTimeout`; `Cancelled` if the caller hangs up. leaves: the job then goes on."""
    limit_s = settings_of(request).run_timeout_s
    ended = asyncio.create_task(end_of(store_of(request), job.id))
    hung_up = asyncio.create_task(_hung_up(request))
    try:
        await asyncio.wait([ended, hung_up], timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            return ended.result()
        if not hung_up.done():
            message = f"The request takes longer than {limit_s:g} s. It goes on; its result is in the queue under {job.id}."
            leaves = True
            raise RunTimeout(message)
        raise Cancelled("The client closed the connection.")
    finally:
        ended.cancel()
        hung_up.cancel()
        if not (ended.done() and not ended.cancelled()) and not leaves:
            await give_up(store_of(request), job.id)


async def end_of(store: JobStore, job_id: UUID) -> Job:
    """The job when it has ended, however long that takes and the database is away."""
    async with store.watch(job_id) as changes:
        while True:
            job = await patiently(lambda: store.get(job_id))
            if job is None:  # with `store_io` off it is deleted an hour after its end
                raise Cancelled
            if job.state.ended:
                return job
            await changes.changed(LOOK_AGAIN_S)


async def give_up(store: JobStore, job_id: UUID) -> None:
    """Cancels the job of a caller that is gone, also while this task is cancelled itself."""
    logger.info("caller hung up", extra={"action": "hung_up", "job_id": str(job_id)})
    with suppress(StoreAway):
        await asyncio.shield(asyncio.ensure_future(store.request_cancel(job_id)))


def output_of(connection: HTTPConnection, job: Job) -> dict[str, Any]:
    """The output of a job that succeeded, as this caller sees it."""
    output: dict[str, Any] = responses.with_absolute_urls(
        job.result, service_base(connection.scope, settings_of(connection).public_url)
    )
    return output


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _EventStream(StreamingResponse):
    """The events of a job. If the job fails, the last one is its error, and the connection is cut: neither of fal's clients
    tells an error among the events from an output, but both raise when a stream breaks off.
    """

    def __init__(
        self, request: Request, endpoint: Endpoint, caller: Caller, accepted: Accepted, *, leaves: bool, headers: dict[str, str]
    ):
        super().__init__(self._events(), media_type="text/event-stream", headers=headers)
        self._request, self._endpoint, self._caller = request, endpoint, caller
        self._accepted, self._leaves = accepted, leaves
        self._ended = self._failed = False

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Sends the answer."""

        async def send_uncut(message: Any) -> None:
            if not (self._failed and message["type"] == "http.response.body" and not message.get("more_body")):
                await send(message)

        try:
            with quotas_of(self._request).stream(self._caller.owner):
                await super().__call__(scope, receive, send_uncut)
        finally:
            if not self._ended and not self._leaves:
                await give_up(store_of(self._request), self._accepted.job.id)

    async def _events(self) -> AsyncIterator[str]:
        job_id, last_seq, store = self._accepted.job.id, 0, store_of(self._request)
        yield self._event(None)
        async with store.watch_lines(job_id) as changes:
            while True:
                try:
                    job = await store.get(job_id, last_seq)
                except StoreAway:
                    logger.warning("stream interrupted", exc_info=True, extra={"action": "stream_outage"})
                    job = self._accepted.job
                if job is None:
                    return
                for line in job.lines:
                    last_seq = line.seq
                    yield self._event(line)
                if job.state.ended:
                    self._ended = True
                    yield self._last_event(job)
                    return
                if not await changes.changed(HEARTBEAT_S):
                    yield ": still here\n\n"

    def _event(self, line: responses.LoggedLine | None) -> str:
        job_input = self._accepted.input or self._endpoint.input.model_construct()
        return f"data: {json.dumps(responses.partial(job_input, self._endpoint.output, line))}\n\n"

    def _last_event(self, job: Job) -> str:
        if failure := responses.failure_of(job):
            self._failed = True
            return f"event: error\ndata: {json.dumps({**failure.body, 'status': failure.status})}\n\n"
        return f"data: {json.dumps(output_of(self._request, job))}\n\n"
