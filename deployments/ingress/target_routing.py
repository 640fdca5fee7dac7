"""Which part of the service a request is for: fal's clients name it by path, by host or by a header.

fal has a host each for queue, runs, tokens and files; here they are path prefixes on one port. If DNS leads fal's hosts here,
`Host` tells which one was meant. The JavaScript client's official proxy protocol sends every request to `/api/fal/proxy`, with
the real URL in `x-fal-target-url`. Both become the prefixed path by rewriting the ASGI scope: there is no second request, so
nothing is buffered, and no URL from a caller is fetched.
"""

from typing import Any
from urllib.parse import unquote, urlsplit

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

PROXY_PATH = "/api/fal/proxy"
CDN_HOST = "v3.fal.media"
PREFIXES = {
    "queue.fal.run": "/queue",
    "fal.run": "/run",
    "rest.fal.ai": "/rest",
    "rest.alpha.fal.ai": "/rest",
    CDN_HOST: "/cdn",
    # the Python client's backups for the first two: where it sends a request again if it cannot connect
    "queue.falrun.com": "/queue",
    "falrun.com": "/run",
}
FILES_PREFIX = "/files/"
UPLOAD_PATH = "/files/upload"
_BY_HOST = "reelray.routed_by_host"


class TargetRouting:
    """ASGI middleware: from target header or host to path prefix."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, rewritten if need be; answers 400 to a target that is not in the table."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        root_path = scope.get("root_path", "")
        path = scope["path"].removeprefix(root_path)
        if path == PROXY_PATH and scope["type"] == "http":
            rewritten = _from_target(Headers(scope=scope).get("x-fal-target-url", ""), root_path)
            if rewritten is None:
                await JSONResponse("Invalid request", 400)(scope, receive, send)  # the words of fal's proxies
                return
            scope = {**scope, **rewritten}
        elif prefix := PREFIXES.get(_host_name(_host(scope) or "")):
            whole = path if _is_file(path) else prefix + path
            scope = {**scope, "path": root_path + whole, _BY_HOST: True}
        await self.app(scope, receive, send)


def service_base(scope: Scope, public_url: str | None) -> str:
    """The service's own URL as this caller knows it, without a slash at the end."""
    if public_url is not None:
        return public_url.rstrip("/")
    host = _host(scope)
    if host is None:
        name, port = scope["server"]
        host = f"{name}:{port}"
    scheme = {"ws": "http", "wss": "https"}.get(scope["scheme"], scope["scheme"])
    return f"{scheme}://{host}{scope.get('root_path', '')}"


def queue_base(scope: Scope, public_url: str | None) -> str:
    """The URL that this caller puts before "/owner/alias", without a slash at the end."""
    prefix = "" if public_url is None and scope.get(_BY_HOST) else PREFIXES["queue.fal.run"]
    return service_base(scope, public_url) + prefix


def _is_file(path: str) -> bool:
    """The URLs of files have no prefix: a caller who reaches us as queue.fal.run fetches files from that host too."""
    return path.startswith(FILES_PREFIX) and path != UPLOAD_PATH and not path.startswith(f"{UPLOAD_PATH}/")


def files_base(scope: Scope, public_url: str | None) -> str:
    """The URL that this caller puts before "/files/": of fal's host for files, if it reaches us by one of fal's hosts."""
    if public_url is not None or not scope.get(_BY_HOST):
        return service_base(scope, public_url)
    port = (_host(scope) or "").partition(":")[2]
    return f"{scope['scheme']}://{CDN_HOST}{f':{port}' if port.isdecimal() else ''}{scope.get('root_path', '')}"


def _from_target(target: str, root_path: str) -> dict[str, Any] | None:
    """The scope's new path and query; the proxy URL's own query is ignored. None if the target is not one of fal's hosts."""
    try:
        url = urlsplit(target)
        prefix = PREFIXES.get(url.hostname or "")
    except ValueError:
        return None
    if prefix is None or url.scheme not in ("http", "https"):
        return None
    return {"path": root_path + prefix + unquote(url.path), "query_string": url.query.encode("latin-1", "replace")}


def _host(scope: Scope) -> str | None:
    host: bytes | None = next((value for key, value in scope["headers"] if key == b"host"), None)
    return None if host is None else host.decode("latin-1")


def _host_name(host: str) -> str:
    return host.partition(":")[0].lower()
