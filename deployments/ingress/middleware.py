"""What applies to every answer, whatever its route: a request id, fal's error shape even for our own bugs, CORS.

Plain ASGI rather than Starlette's BaseHTTPMiddleware, which puts a task and a stream between each route and the socket:
every waiting Python client asks for its status ten times a second, and server-sent events must not be buffered.
"""

import logging
import re
import uuid
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.ingress.target_routing import PREFIXES, TargetRouting
from deployments.schemas.failures import Failure, error_failure
from deployments.settings import Settings
from engines.errors import Forbidden, InternalError

logger = logging.getLogger(__name__)

LOCAL_ORIGINS = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
EXPOSED_HEADERS = [
    "x-fal-request-id",
    "x-fal-request-timeout-type",
    "x-fal-error-type",
    "x-fal-needs-retry",
    "x-fal-runner-hints",
    "x-fal-billable-units",
    "x-reelray-ignored-fields",
    "x-reelray-ignored-headers",
    "x-reelray-trace-id",
    "etag",
    "content-range",
    "content-disposition",
]
"""What the JavaScript client, its callers, pages of ours and players read; a browser hides headers that are not named here."""


def add_middleware(app: FastAPI, settings: Settings) -> None:
    """Puts the middleware of this file around the routes of `app`. The last one added is the outermost."""
    app.add_middleware(TargetRouting)
    app.add_middleware(LastResort)
    if settings.auth == "open":
        app.add_middleware(TrustedPages, settings=settings)
    app.add_middleware(
        CORSMiddleware,
        **_allowed_origins(settings),
        allow_methods=["GET", "HEAD", "POST", "PUT", "DELETE"],
        allow_headers=["*"],  # the answer lists those that the preflight asks for, e.g. x-fal-*
        expose_headers=EXPOSED_HEADERS,
    )
    app.add_middleware(RequestIds)


def _allowed_origins(settings: Settings) -> dict[str, Any]:
    """Whose pages may read answers. With keys a page reads no more than the key or token allows that it was given."""
    if settings.auth == "open":
        return {"allow_origins": settings.allowed_origins or (), "allow_origin_regex": LOCAL_ORIGINS}
    return {"allow_origins": ("*",) if settings.allowed_origins is None else settings.allowed_origins}


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
    """Refuses other sites' web pages, for a service that requires no key.

    A browser runs the pages of any site, and can reach a service that listens on loopback only. CORS does not help: it keeps a
    page from reading the answer, but a browser sends a POST of plain text without a preflight, and the job is created. With every
    write a browser names the page's site in `Origin`; requests without it do not come from a page, and pass.

    The owner of any site can also point its name at this machine (DNS rebinding). To the browser its pages then call their own
    host, so they may read as well. But the name is in `Host`: this service answers to its own names only, and to addresses.

    Pages from this machine, from `public_url` and from `allowed_origins` are trusted. A service that is open to the network and
    was not told its name by `public_url` answers to any: then a page of any site can use it through the browser of somebody on
    that network. It also trusts pages that call their own host, as fal's client does through a relative proxy URL.
    """

    def __init__(self, app: ASGIApp, settings: Settings):
        self.app = app
        self.origins = {_origin(url) for url in (settings.public_url, *(settings.allowed_origins or ())) if url}
        self.hosts = {"localhost", urlsplit(settings.public_url or "").hostname, *PREFIXES}
        self.open_to_network = settings.open_to_network
        self.knows_its_name = not settings.open_to_network or settings.public_url is not None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, or answers 403."""
        refusal = None
        if scope["type"] in ("http", "websocket"):  # CORS does not hold for WebSockets: every one may write
            refusal = self._refusal(scope.get("method", "websocket"), Headers(scope=scope))
        if refusal is not None:
            await failure_response(error_failure(Forbidden(refusal)))(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _refusal(self, method: str, headers: Headers) -> str | None:
        host, origin = headers.get("host"), headers.get("origin")
        if host is not None and not self._is_own(host):
            return "This service does not answer to that host name. Its operator can set public_url."
        if method not in SAFE_METHODS and origin is not None and not self._is_trusted(origin, host):
            return "Web pages of another host may not call this service."
        return None

    def _is_own(self, host: str) -> bool:
        if not self.knows_its_name:
            return True
        try:
            name = urlsplit(f"//{host}").hostname
            return name in self.hosts or ip_address(name or "") is not None
        except ValueError:  # neither
            return False

    def _is_trusted(self, origin: str, host: str | None) -> bool:
        if re.fullmatch(LOCAL_ORIGINS, origin) or origin in self.origins:
            return True
        return self.open_to_network and host is not None and origin in (f"http://{host}", f"https://{host}")


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
