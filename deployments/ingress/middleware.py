"""What holds for every answer, whatever route it came from: a request id, fal's shape even for our own mistakes, CORS.

Plain ASGI rather than Starlette's BaseHTTPMiddleware, which puts a task and a stream between each route and the socket:
status is asked ten times a second by every waiting Python client, and events must not be buffered.
"""

import logging
import re
import uuid
from collections.abc import Mapping
from urllib.parse import urlsplit

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.ingress.target_routing import TargetRouting
from deployments.schemas.failures import Failure, error_failure
from deployments.settings import Settings
from engines.errors import Forbidden, InternalError

logger = logging.getLogger(__name__)

LOCAL_ORIGINS = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
EXPOSED_HEADERS = ["x-fal-request-id", "x-fal-request-timeout-type", "x-fal-error-type", "x-fal-needs-retry"]
"""What the JavaScript client reads; a browser hides headers that are not named here."""


def add_middleware(app: FastAPI, settings: Settings) -> None:
    """Puts the layers of this file around the routes of `app`. The last one added is the outermost."""
    app.add_middleware(TargetRouting)
    app.add_middleware(LastResort)
    if settings.auth == "open":
        app.add_middleware(TrustedPages, settings=settings)
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


class TrustedPages:
    """Refuses what a page of somebody else's would write, where the service asks for no key.

    Everybody's browser runs everybody's pages, and may reach a service that listens on loopback only. CORS does not help: it
    keeps a page from reading the answer, but a POST of text is sent without asking first, and the job is there. Every browser
    names the page in `Origin` when it writes; what is no browser does not, and passes.

    A page is trusted that comes from this machine, or from `public_url`. That its host is the one it calls, as fal's client does
    through a relative proxy URL, is enough only if the service is meant for the network: elsewhere so does a page whose own name
    was made to point at this machine (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, settings: Settings):
        self.app = app
        self.public_origin = _origin(settings.public_url) if settings.public_url else None
        self.trusts_own_host = settings.open_to_network

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, or answers 403."""
        if scope["type"] == "http" and scope["method"] not in SAFE_METHODS:
            headers = Headers(scope=scope)
            origin = headers.get("origin")
            if origin is not None and not self._is_trusted(origin, headers.get("host")):
                refusal = Forbidden("Web pages of another host may not call this service.")
                await failure_response(error_failure(refusal))(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _is_trusted(self, origin: str, host: str | None) -> bool:
        if re.fullmatch(LOCAL_ORIGINS, origin) or origin == self.public_origin:
            return True
        return self.trusts_own_host and host is not None and origin in (f"http://{host}", f"https://{host}")


def _origin(url: str) -> str:
    """As browsers write it: without the scheme's own port, in lower case."""
    parts = urlsplit(url.lower())
    own_port = {"http": ":80", "https": ":443"}.get(parts.scheme, "")
    return f"{parts.scheme}://{parts.netloc.removesuffix(own_port)}"


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
