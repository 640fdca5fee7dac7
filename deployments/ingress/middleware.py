"""What applies to every answer, whatever its route: a request id, fal's error shape even for our own bugs, CORS.

Plain ASGI rather than Starlette's BaseHTTPMiddleware, which puts a task and a stream between each route and the socket:
every waiting Python client asks for its status ten times a second, and server-sent events must not be buffered.
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
    """Puts the middleware of this file around the routes of `app`. The last one added is the outermost."""
    app.add_middleware(TargetRouting)
    app.add_middleware(LastResort)
    if settings.auth == "open":
        app.add_middleware(TrustedPages, settings=settings)
    app.add_middleware(
        CORSMiddleware,
        allow_origin_regex=LOCAL_ORIGINS,
        allow_methods=["GET", "HEAD", "POST", "PUT", "DELETE"],
        allow_headers=["*"],  # the answer lists those that the preflight asks for, e.g. x-fal-*
        expose_headers=EXPOSED_HEADERS,
    )
    app.add_middleware(RequestIds)


def failure_response(failure: Failure, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """A failure as the caller sees it."""
    return JSONResponse(failure.body, failure.status, {**failure.headers, **(headers or {})})


class RequestIds:
    """Adds x-fal-request-id to every answer: the job's id, if the route set `request.state.request_id`, else a new one.

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
    """Refuses writes from other sites' web pages, for a service that requires no key.

    A browser runs the pages of any site, and can reach a service that listens on loopback only. CORS does not help: it keeps a
    page from reading the answer, but a browser sends a POST of plain text without a preflight, and the job is created. With every
    write a browser names the page's site in `Origin`; requests without it do not come from a page, and pass.

    Pages from this machine and from `public_url` are trusted. On a service that is open to the network, so are pages that call
    their own host, as fal's client does through a relative proxy URL. Elsewhere they are not: the owner of any site can point
    its name at this machine (DNS rebinding).
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
    """A URL's origin as browsers write it: in lower case, without the scheme's default port."""
    parts = urlsplit(url.lower())
    own_port = {"http": ":80", "https": ":443"}.get(parts.scheme, "")
    return f"{parts.scheme}://{parts.netloc.removesuffix(own_port)}"


class LastResort:
    """Answers 500 for an exception that no handler takes, and says nothing about it in the body.

    Starlette's own such handler is outside all other middleware, so its answers have neither a request id nor CORS headers.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on. If the answer has begun, the exception is raised to the server, which cuts the answer off."""
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
