"""What holds for every answer, whatever route it came from: a request id, fal's shape even for our own mistakes, CORS.

Plain ASGI rather than Starlette's BaseHTTPMiddleware, which puts a task and a stream between each route and the socket:
status is asked ten times a second by every waiting Python client, and events must not be buffered.
"""

import logging
import uuid
from collections.abc import Mapping

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.jobs.job import Failure
from deployments.proxy import TargetRouting
from deployments.schemas import error_failure
from engines.errors import InternalError

logger = logging.getLogger(__name__)

LOCAL_ORIGINS = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
EXPOSED_HEADERS = ["x-fal-request-id", "x-fal-request-timeout-type", "x-fal-error-type", "x-fal-needs-retry"]
"""What the JavaScript client reads; a browser hides headers that are not named here."""


def add_middleware(app: FastAPI) -> None:
    """Puts the layers of this file around the routes of `app`. The last one added is the outermost."""
    app.add_middleware(TargetRouting)
    app.add_middleware(LastResort)
    app.add_middleware(
        CORSMiddleware,
        allow_origin_regex=LOCAL_ORIGINS,
        allow_methods=["GET", "HEAD", "POST", "PUT", "DELETE"],
        allow_headers=["*"],  # answered with those that the preflight asks for: authorization, x-fal-*
        expose_headers=EXPOSED_HEADERS,
    )
    app.add_middleware(RequestIds)


def failure_response(failure: Failure, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """A failure as the caller sees it."""
    return JSONResponse(failure.body, failure.status, {**failure.headers, **(headers or {})})


class RequestIds:
    """Names every answer in x-fal-request-id: by its job where the route set `request.state.request_id`, else by itself.

    The JavaScript client knows a request's id from this header only; the Python client takes a 5xx without it for a proxy's.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on and adds the header to its answer."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                request_id = state.get("request_id") or str(uuid.uuid4())
                message["headers"] = [*message["headers"], (b"x-fal-request-id", request_id.encode())]
            await send(message)

        await self.app(scope, receive, send_with_id)


class LastResort:
    """Answers 500 for an exception that no handler knows, with nothing of it in the body.

    Starlette's own last resort stands outside all other middleware, so that its answers had neither request id nor CORS.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on. An answer that has begun can only be cut off: the exception goes on to the server."""
        begun = False

        async def watched_send(message: Message) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watched_send)
        except Exception:
            if begun or scope["type"] != "http":
                raise
            logger.exception("uncaught exception", extra={"action": "uncaught", "path": scope["path"]})
            await failure_response(error_failure(InternalError()))(scope, receive, send)
