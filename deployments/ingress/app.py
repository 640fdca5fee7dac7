"""The door: fal's queue API, the files and a health check, as reads and writes of the job store.

It imports neither torch nor ray, so it starts in a second and stands wherever it is put: inside Ray Serve, or beside the
cluster under uvicorn, in several processes if need be. Routes only: what an input may be is said in `schemas.py`, what a
submission may ask for in `submission.py`, how a job looks to its caller in `wire.py`.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any
from uuid import UUID

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from pydantic import ValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from deployments import webhook_listing as listing
from deployments import wire
from deployments.access import ANYBODY, Caller, identify, issued_token, shown_secret
from deployments.files import file_response
from deployments.jobs.job import Failure, Job
from deployments.jobs.keys import Scope
from deployments.jobs.outbox import Outbox, Webhook
from deployments.jobs.postgres import database_url
from deployments.jobs.store import JobStore, StoreAway
from deployments.middleware import add_middleware, failure_response
from deployments.proxy import queue_base, service_base
from deployments.schemas import ENDPOINTS, Endpoint, TokenRequest, error_failure, validation_failure
from deployments.settings import Settings
from deployments.storage import FileStore
from deployments.submission import idempotency, idempotency_key, is_set, max_queue_length, new_job
from deployments.webhooks import jwks
from engines.errors import BadRequest, BodyTooLarge, QueueFull, ReelrayError

logger = logging.getLogger(__name__)

STREAM_INTERVAL_S = 3.0
"""A status stream looks this often for what does not wake it, the queue moving up, and says something to stay open."""

STREAM_PAUSE_S = 0.2
"""Lines that are logged so soon after an event are sent together in the next; a change of state is told at once."""

HEALTH_TIMEOUT_S = 2.0
BODY_TIMEOUT_S = 60.0
MAX_TOKEN_BODY_BYTES = 10_000

JWKS_MAX_AGE_S = 3600

START_S = 10.0
"""How long the door stays shut while its database is away; then it opens and says so."""

OUTAGES = (StoreAway, TimeoutError)


class TextRoute(APIRoute):
    """Gives the endpoint its path and query parameters as the text they are.

    FastAPI documents them from the signature as ever; but having it convert and validate them took 60 of a status read's
    280 µs of CPU time (FastAPI 0.165, 2 cores), and an id that is no UUID is a 404 here, not a 422.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What FastAPI calls for each request."""
        endpoint: Callable[..., Coroutine[Any, Any, Response]] = self.endpoint
        names = [parameter.name for parameter in self.dependant.query_params]

        async def handle(request: Request) -> Response:
            query = request.query_params
            return await endpoint(request, **request.path_params, **{name: query[name] for name in names if name in query})

        return handle


queue = APIRouter(prefix="/queue", tags=["queue"], route_class=TextRoute)
webhooks = APIRouter(prefix="/webhooks/deliveries", tags=["webhooks"], route_class=TextRoute)
house = APIRouter(route_class=TextRoute)


def create_app(settings: Settings, store: JobStore | None = None) -> FastAPI:
    """The ASGI app. store: an open job store, which stays the caller's; without one the app opens its own and closes it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if store is not None:
            yield
            return
        opening = asyncio.create_task(_open_store(app))
        opened, _ = await asyncio.wait([opening], timeout=START_S)
        if opened:
            opening.result()
        try:
            yield
        finally:
            opening.cancel()
            await asyncio.gather(opening, return_exceptions=True)
            if app.state.store is not None:
                await app.state.store.close()

    app = FastAPI(title="Reelray", lifespan=lifespan, redirect_slashes=False)  # half of the Python client follows no redirect
    app.state.settings = settings
    app.state.store = store
    app.state.files = FileStore(settings.files_url)
    served = settings.model_configs()
    for endpoint in ENDPOINTS.values():
        if endpoint.model in served:
            _add_submit_route(app, endpoint)
    app.include_router(queue)
    app.include_router(webhooks)
    app.include_router(house)
    add_middleware(app, settings)
    app.add_exception_handler(ReelrayError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(_UnknownRequest, _on_unknown_request)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    for outage in OUTAGES:
        app.add_exception_handler(outage, _on_outage)
    return app


async def _open_store(app: FastAPI) -> None:
    """Until it succeeds: uvicorn takes a worker that cannot start for a broken app, and ends its healthy sisters as well."""
    while app.state.store is None:
        try:
            app.state.store = await JobStore.open(await asyncio.to_thread(database_url, app.state.settings))
        except StoreAway:
            logger.exception("no database yet", extra={"action": "store_away"})
        except Exception:  # a password that is wrong, a schema that is newer: nothing that waiting mends
            logger.critical("the database cannot be used: 503 until a restart", exc_info=True, extra={"action": "store_unusable"})
            raise


def _add_submit_route(app: FastAPI, endpoint: Endpoint) -> None:
    async def submit(request: Request) -> Response:
        return await _submit(request, endpoint)

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
    """Writes the job, then answers with its id."""
    settings = _settings(request)
    caller = await _caller(request, endpoint.id)
    caller.require(Scope.SUBMIT)
    new = new_job(endpoint.id, caller.owner, request.headers, request.query_params, settings.queue.max_attempts)
    if new.webhook_url is not None:
        new = replace(new, service_url=service_base(request.scope, settings.public_url))
    limit = max_queue_length(request.query_params)
    idempotency_key(request.headers)  # a bad one is told before megabytes are read
    body = await _read_body(request, settings.max_body_bytes)
    new = replace(new, idempotency=idempotency(request.headers, endpoint.id, body, settings.queue.idempotency_s))
    if (
        limit is not None
        and await _store(request).queued(endpoint.id, at_most=limit + 1) > limit
        and not await _store(request).repeated(new)  # a repeat adds nothing, and who is told 429 does not learn of the job
    ):
        raise QueueFull(f"More than {limit} requests are waiting already.")

    failure = None
    try:
        new = replace(new, input=endpoint.input.parse(body).resolved().model_dump(mode="json", exclude_none=True))
    except ValidationError as exc:
        failure = validation_failure(exc)
        if new.webhook_url is None:  # else the caller waits for a webhook, and only a job sends one
            return failure_response(failure)
    store = _store(request)
    try:
        job = await (store.submit(new) if failure is None else store.submit_failed(new, failure))
    except OUTAGES:
        # One of the store's tries may have been committed though its answer was lost. On 503 the JavaScript client would
        # submit again, under a new id, and the GPUs would render twice; on 500 neither client repeats a submission.
        logger.exception("submission of unknown outcome", extra={"action": "submit_unknown", "endpoint": endpoint.id})
        detail = "The service failed while it queued the request, which may or may not run."
        return failure_response(_request_failure(500, "internal_error", detail))
    request.state.request_id = str(job.id)
    logger.info("job submitted", extra={"action": "submit", "job_id": str(job.id), "endpoint": endpoint.id})
    return _answer(wire.submitted(job, queue_base(request.scope, settings.public_url)), 200)


@queue.get("/{app:path}/requests/{request_id}/status")
async def status(request: Request, app: str, request_id: str, logs: str = "0") -> Response:
    """Where a request stands, with all its log lines so far if logs is 1 or true. 202 until it is completed, then 200."""
    with_logs = is_set(logs)
    job = await _job(request, app, request_id, Scope.READ, 0 if with_logs else None)
    body = wire.status(job, job.lines if with_logs else None, queue_base(request.scope, _settings(request).public_url))
    return _answer(body, 200 if job.state.ended else 202)


@queue.get("/{app:path}/requests/{request_id}/status/stream")
async def status_stream(request: Request, app: str, request_id: str, logs: str = "0") -> Response:
    """The status as server-sent events: one whenever it changes, each with the log lines that are new, until completed.

    With logs, an event's id is the `seq` of the last line told; `Last-Event-ID`, as a browser sends it on reconnecting, goes on
    after it.
    """
    job = await _job(request, app, request_id, Scope.READ)
    queue_url = queue_base(request.scope, _settings(request).public_url)
    events = _status_events(_store(request), job.id, is_set(logs), queue_url, wire.last_event_id(request.headers))
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


async def _status_events(store: JobStore, job_id: UUID, with_logs: bool, queue_url: str, last_seq: int) -> AsyncIterator[str]:
    last_sent: dict[str, Any] | None = None
    while True:
        try:
            # before the first read, so that no change falls between
            async with store.watch(job_id) as changes, store.watch_lines(job_id) as lines_too:
                while True:
                    job = await store.get(job_id, last_seq if with_logs else None)
                    if job is None:
                        return
                    lines = job.lines if with_logs else None
                    sent = wire.status(job, None, queue_url)
                    if lines or sent != last_sent:
                        last_sent, last_seq = sent, lines[-1].seq if lines else last_seq
                        event_id = f"id: {last_seq}\n" if last_seq else ""
                        yield f"{event_id}data: {json.dumps(wire.status(job, lines, queue_url))}\n\n"
                    else:
                        yield ": still here\n\n"
                    if job.state.ended:
                        return
                    if not await changes.changed(STREAM_PAUSE_S):
                        await (lines_too if with_logs else changes).changed(STREAM_INTERVAL_S)
        except OUTAGES:
            # The JavaScript client takes whatever it heard last for the end, so a stream must not close before the job does.
            logger.warning("status stream waits for the database", exc_info=True, extra={"action": "stream_outage"})
            yield ": still here\n\n"
            await asyncio.sleep(1.0)


@queue.get("/{app:path}/requests/{request_id}")
@queue.get("/{app:path}/requests/{request_id}/response")
async def result(request: Request, app: str, request_id: str) -> Response:
    """The output of a completed request, or the error it ended in; 400 before that: any 2xx would pass for the output."""
    job = await _job(request, app, request_id, Scope.READ)
    if not job.state.ended:
        raise BadRequest("Request is still in progress")
    if failure := wire.failure_of(job):
        return failure_response(failure)
    return JSONResponse(wire.with_absolute_urls(job.result, service_base(request.scope, _settings(request).public_url)))


@queue.put("/{app:path}/requests/{request_id}/cancel")
async def cancel(request: Request, app: str, request_id: str) -> Response:
    """Takes a waiting request out of the queue, and asks a running one to stop."""
    job = await _job(request, app, request_id, Scope.SUBMIT)
    found = await _store(request).request_cancel(job.id)
    if found is None:
        raise _UnknownRequest
    if found.ended:
        return JSONResponse({"status": "ALREADY_COMPLETED"}, 400)
    return JSONResponse({"status": "CANCELLATION_REQUESTED"}, 202)


@webhooks.get("")
async def list_webhooks(request: Request, since: str = "", cursor: str = "", limit: str = "50") -> Response:
    """The caller's webhooks, oldest first: what a receiver that was down has missed. One appears seconds after its job's end.

    since: ISO 8601 or seconds since 1970, at or after which the job ended. cursor: the `next_cursor` of the page before, to go on
    from there at any time; it outweighs `since`. limit: 1 to 100.
    """
    caller = await _caller(request)
    caller.require(Scope.READ)
    after = listing.start(since, cursor)
    page = await _outbox(request).page(caller.owner, after, listing.limit(limit))
    return JSONResponse(listing.page(page, after))


@webhooks.get("/{request_id}")
async def webhook(request: Request, request_id: str) -> Response:
    """A request's webhook and the log of its attempts."""
    found = await _webhook(request, request_id, Scope.READ)
    return JSONResponse(listing.entry(found) | {"log": listing.log(await _outbox(request).attempts(found.job_id))})


@webhooks.post("/{request_id}/redeliver")
async def redeliver(request: Request, request_id: str) -> Response:
    """Sends a webhook again, delivered or not, with all its retries."""
    found = await _webhook(request, request_id, Scope.SUBMIT)
    if not await _outbox(request).redeliver(found.job_id):
        raise _UnknownRequest
    return JSONResponse({"status": "REDELIVERY_REQUESTED"}, 202)


@house.get("/.well-known/jwks.json")
@house.get("/rest/.well-known/jwks.json", include_in_schema=False)  # where it is for who reaches us as rest.fal.ai
async def keys(request: Request) -> Response:
    """The public keys that webhooks are signed with, as a JSON Web Key Set."""
    published = await _outbox(request).published_keys()
    return JSONResponse(jwks(published), headers={"cache-control": f"public, max-age={JWKS_MAX_AGE_S}"})


@house.post("/rest/tokens/")
@house.post("/rest/tokens", include_in_schema=False)
@house.post("/rest/tokens/realtime", include_in_schema=False)
async def token(request: Request) -> Response:
    """A short-lived token to give to a page instead of the API key, as a bare JSON string.

    Queue paths take it as the query parameter `fal_jwt_token`. It may what the key may, except `admin`, at the apps named, and
    ends with the key, or with the secret that it was asked for with.
    """
    secret = None if _settings(request).auth == "open" else await shown_secret(request, _store(request))
    try:
        asked = TokenRequest.model_validate_json(await _read_body(request, MAX_TOKEN_BODY_BYTES) or b"{}")
    except ValidationError as exc:
        return failure_response(validation_failure(exc))
    return JSONResponse(issued_token(secret, asked), headers={"cache-control": "no-store"})


@house.head("/files/{name:path}", include_in_schema=False)
@house.get("/files/{name:path}")
async def file(request: Request, name: str) -> Response:
    """A generated file, or the byte range asked for."""
    files: FileStore = request.app.state.files
    return await file_response(files, name, request, _settings(request).retention.files_s)


@house.get("/health")
async def health(request: Request) -> Response:
    """200 while the job store answers, else 503."""
    async with asyncio.timeout(HEALTH_TIMEOUT_S):
        await _store(request).get(UUID(int=0))
    return JSONResponse({"status": "ok"})


class _UnknownRequest(Exception):
    """There is no such job, or no webhook of it, or it is another caller's."""


async def _job(request: Request, app: str, request_id: str, scope: Scope, lines_after: int | None = None) -> Job:
    """The job that a path names, for a caller with `scope`; lines_after: see `JobStore.get`.

    One that is out of its reach, or of another endpoint, is unknown.
    """
    caller = await _caller(request, app)
    try:
        job_id = UUID(request_id)
    except ValueError:
        raise _UnknownRequest from None
    job = await _store(request).get(job_id, lines_after)
    if job is None or not caller.reaches(job.owner) or wire.app_id(job.endpoint) != wire.app_id(app):
        raise _UnknownRequest
    caller.require(scope)
    request.state.request_id = str(job.id)
    return job


async def _webhook(request: Request, request_id: str, scope: Scope) -> Webhook:
    """The webhook of the job that a path names, for a caller with `scope`."""
    caller = await _caller(request)
    try:
        job_id = UUID(request_id)
    except ValueError:
        raise _UnknownRequest from None
    found = await _outbox(request).get(job_id)
    if found is None or not caller.reaches(found.owner):
        raise _UnknownRequest
    caller.require(scope)
    request.state.request_id = str(job_id)
    return found


async def _caller(request: Request, app: str | None = None) -> Caller:
    """Who asks; app: of which app, if of one. Raises `Unauthorized`, `Forbidden`."""
    if _settings(request).auth == "open":
        return ANYBODY
    return await identify(request, _store(request), app)


async def _read_body(request: Request, max_bytes: int) -> bytes:
    """The body, given up as soon as it is longer than `max_bytes` or too slow. Raises `BodyTooLarge`, `BadRequest`."""
    declared = request.headers.get("content-length", "0")
    body = bytearray()
    if not declared.isdecimal() or int(declared) <= max_bytes:
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > max_bytes:
                        break
                else:
                    return bytes(body)
        except TimeoutError:
            raise BadRequest(f"The request body did not arrive within {BODY_TIMEOUT_S:g} s.") from None
    raise BodyTooLarge(f"The request body is larger than {max_bytes} bytes.")


def _answer(body: dict[str, Any], status: int) -> Response:
    """JSON, written three times faster than Starlette's `JSONResponse` does it."""
    return Response(to_json(body), status, media_type="application/json")


def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


def _store(request: Request) -> JobStore:
    store: JobStore | None = request.app.state.store
    if store is None:
        raise StoreAway("the store has not been opened yet")
    return store


def _outbox(request: Request) -> Outbox:
    return Outbox(_store(request))


def _request_failure(status: int, error_type: str, detail: str) -> Failure:
    return Failure(status, {"detail": detail, "error_type": error_type}, detail, error_type, {"X-Fal-Error-Type": error_type})


async def _on_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, ReelrayError)
    return failure_response(error_failure(exc))


async def _on_http_error(request: Request, exc: Exception) -> Response:
    """The router's own answers, 404 and 405 for the most part."""
    assert isinstance(exc, HTTPException)
    if exc.status_code == 404:
        failure = _request_failure(404, "not_found", f"Path {request.url.path} not found")
    else:
        failure = _request_failure(exc.status_code, "bad_request", exc.detail)
    return failure_response(failure, exc.headers)


async def _on_unknown_request(request: Request, exc: Exception) -> Response:
    return JSONResponse({"status": "NOT_FOUND"}, 404)


async def _on_disconnect(request: Request, exc: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _on_outage(request: Request, exc: Exception) -> Response:
    logger.error("the database is away", exc_info=exc, extra={"action": "outage", "path": request.url.path})
    return failure_response(_request_failure(503, "internal_error", "The service is temporarily unavailable."))
