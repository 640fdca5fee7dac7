"""The HTTP app: fal's queue API, the files and a health check, as reads and writes of the job store.

It imports neither torch nor ray, so it starts in a second and runs anywhere: inside Ray Serve, or beside the cluster under
uvicorn, in several processes if need be. This file puts the app together; the routes are in the files beside it.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from difflib import get_close_matches

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from deployments.files.file_store import FileStore
from deployments.ingress import realtime, status_stream
from deployments.ingress.body import Bodies
from deployments.ingress.middleware import add_middleware, failure_response
from deployments.ingress.quotas import Quotas
from deployments.ingress.request_context import InvalidBody, UnknownRequest
from deployments.ingress.routes import (
    catalogue_routes,
    file_routes,
    queue_routes,
    run_routes,
    service_routes,
    upload_routes,
    webhook_routes,
)
from deployments.jobs.database import StoreAway, StoreRefused
from deployments.jobs.store import JobStore
from deployments.schemas.endpoint import ENDPOINTS
from deployments.schemas.failures import error_failure, request_failure, validation_failure
from deployments.settings import Settings
from engines.errors import BodyTooSlow, ReelrayError

logger = logging.getLogger(__name__)

START_S = 10.0
"""How long the app waits for its database before it starts anyway, and answers 503 until the database is there."""
REFUSED_PAUSE_S = 5.0
"""How long the app waits before it tries a database again that has refused it."""


def create_app(settings: Settings, database: str | JobStore, check: Callable[[], None] = lambda: None) -> FastAPI:
    """The ASGI app. database: the URL of a store that the app opens and closes; or an open store, which the caller closes.

    check: called for `/health`, in a thread; raises `ReelrayError` while the service is not fit for use.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if not isinstance(database, str):
            yield
            return
        opening = asyncio.create_task(_open_store(app, database))
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

    app = FastAPI(title="Reelray", lifespan=lifespan, redirect_slashes=False)  # parts of fal's Python client follow none
    app.state.settings = settings
    app.state.check = check
    app.state.store = None if isinstance(database, str) else database
    app.state.files = FileStore(settings.files_url)
    app.state.bodies = Bodies(settings.max_bodies_bytes)
    app.state.quotas = Quotas(settings.quotas)
    models = settings.model_configs()
    queue_routes.add_submit_routes(app, models)
    run_routes.add_run_routes(app, models)
    realtime.add_realtime_routes(app, models)
    for routes in (queue_routes, status_stream, webhook_routes, service_routes, upload_routes, catalogue_routes):
        app.include_router(routes.router)
    for files in (upload_routes.files, file_routes.router):
        app.include_router(files)
        app.include_router(files, prefix="/cdn", include_in_schema=False)  # of callers at v3.fal.media
    app.include_router(catalogue_routes.documents)
    catalogue_routes.describe(app)
    add_middleware(app, settings)
    app.add_exception_handler(ReelrayError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(InvalidBody, _on_invalid_body)
    app.add_exception_handler(UnknownRequest, _on_unknown_request)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(StoreAway, _on_outage)
    return app


async def _open_store(app: FastAPI, url: str) -> None:
    """Tries until it succeeds. Failing the start instead would end the other workers too: uvicorn takes the app for broken."""
    while app.state.store is None:
        try:
            app.state.store = await JobStore.open(url, upgrades=app.state.settings.database == "embedded")
        except StoreRefused:  # e.g. a wrong password: its operator has to do something
            event = "the database refuses the service: every answer is 503 until that has changed"
            logger.critical(event, exc_info=True, extra={"action": "store_refused"})
            await asyncio.sleep(REFUSED_PAUSE_S)
        except StoreAway:
            logger.exception("the database is not available yet", extra={"action": "store_away"})


async def _on_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, ReelrayError)
    # the rest of a slow body would otherwise keep its connection for as long as it comes
    return failure_response(error_failure(exc), {"connection": "close"} if isinstance(exc, BodyTooSlow) else None)


async def _on_http_error(request: Request, exc: Exception) -> Response:
    """The router's own answers, mostly 404 and 405."""
    assert isinstance(exc, HTTPException)
    if exc.status_code == 404:
        failure = request_failure(404, "not_found", f"Path {request.url.path} not found. {_right_path(request)}")
    else:
        failure = request_failure(exc.status_code, "bad_request", exc.detail)
    return failure_response(failure, exc.headers)


def _right_path(request: Request) -> str:
    """Says where to submit: at the path most like the request's, which often lacks only /queue, or at any."""
    paths = [f"/queue/{each.id}" for each in ENDPOINTS.values() if each.model in request.app.state.settings.model_configs()]
    likely = get_close_matches(request.url.path, paths, n=1) or paths
    return f"Submit with POST to {' or '.join(likely)}; GET /docs describes every path."


async def _on_invalid_body(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, InvalidBody)
    return failure_response(validation_failure(exc.findings))


async def _on_unknown_request(request: Request, exc: Exception) -> Response:
    return JSONResponse({"status": "NOT_FOUND"}, 404)


async def _on_disconnect(request: Request, exc: Exception) -> Response:
    return Response(status_code=499)  # the caller is gone


async def _on_outage(request: Request, exc: Exception) -> Response:
    logger.error("the database is not available", exc_info=exc, extra={"action": "outage", "path": request.url.path})
    return failure_response(request_failure(503, "internal_error", "The service is temporarily unavailable."))
