"""Hostile callers of uploads and files, over real sockets: a table a kind, and none of them may succeed.

All cases run at once against one service with keys; each has its own test. `a` is the owner of what is attacked, `b` another key.
"""

import asyncio
import base64
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote, urlsplit
from uuid import uuid4

import httpx
import pytest

from deployments.files import uploads
from deployments.files.file_store import FileStore
from deployments.ingress.app import create_app
from deployments.jobs.store import JobStore
from deployments.schemas import tokens
from deployments.settings import Settings, UploadSettings
from tests.conftest import TEMPLATE, execute, of_database
from tests.patience import PATIENCE_S
from tests.wire.service import ENDPOINT, listening, working

SECRET = b"nobody may read this"
MAX_BYTES = 100_000
HOME_FILE = "home-secret"
ACTIVE = re.compile(r"html|xml|svg|script|css|multipart|message", re.IGNORECASE)
INLINE = {"image/gif", "image/jpeg", "image/png", "image/webp", "video/mp4", "video/webm"}
HIDE = {"x-fal-object-lifecycle": json.dumps({"initial_acl": {"default": "hide"}})}
ALIAS = ENDPOINT.rpartition("/")[2]


@dataclass(frozen=True)
class Raw:
    """An answer as it came."""

    status: int
    head: str
    body: bytes

    def header(self, name: str) -> str | None:
        lines = [line.partition(": ")[2] for line in self.head.split("\r\n") if line.lower().startswith(f"{name}: ")]
        assert len(lines) < 2, self.head
        return lines[0] if lines else None


@dataclass
class World:
    """The service and what is in it. hidden: the path of a file that only `a` may read, and open_: of one for everybody."""

    port: int
    store: JobStore
    files: FileStore
    a: str = ""
    b: str = ""
    hidden: str = ""
    forbidden: str = ""
    open_: str = ""

    async def raw(self, head: str, body: bytes = b"", *, wait_s: float = PATIENCE_S) -> Raw:
        """Sends exactly this. A connection that is closed without an answer counts as status 0."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(head.replace("\n", "\r\n").encode("latin-1") + b"\r\n\r\n" + body)
            async with asyncio.timeout(wait_s):
                answer = await reader.read()
        except ConnectionError:
            answer = b""
        finally:
            writer.close()
        begin, _, rest = answer.partition(b"\r\n\r\n")
        return Raw(int(begin.split(b" ")[1]) if begin else 0, begin.decode("latin-1"), rest)

    async def call(self, method: str, path: str, body: bytes = b"", key: str | None = None, **headers: str) -> Raw:
        """A request whose lines are written as they are given. Underscores in the names of headers stand for hyphens."""
        sent = {"host": f"127.0.0.1:{self.port}", "connection": "close"}
        if key is not None:
            sent["authorization"] = f"Key {key}"
        if body or method in ("POST", "PUT"):
            sent["content-length"] = str(len(body))
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.raw("\n".join([f"{method} {path} HTTP/1.1", *(f"{n}: {v}" for n, v in sent.items())]), body)

    async def initiated(self, key: str, form: str = "initiate", asked: dict[str, Any] | None = None, **headers: str) -> Any:
        body = json.dumps({"content_type": "image/png", "file_name": "x.png"} | (asked or {})).encode()
        answer = await self.call("POST", f"/rest/storage/upload/{form}", body, key, **headers)
        assert answer.status == 200, answer.body
        return {name: relative(url) for name, url in json.loads(answer.body).items()}

    async def uploaded(self, key: str, data: bytes, asked: dict[str, Any] | None = None, **headers: str) -> str:
        urls = await self.initiated(key, asked=asked, **headers)
        content_type = (asked or {}).get("content_type", "image/png")
        assert (await self.call("PUT", urls["upload_url"], data, content_type=content_type)).status == 200
        return str(urls["file_url"])

    async def cdn(self, key: str) -> str:
        return str(json.loads((await self.call("POST", "/rest/storage/auth/token", b"{}", key)).body)["token"])

    async def submit(self, key: str | None, url: str, **headers: str) -> Raw:
        body = json.dumps({"prompt": "x", "keyframe_0_image_url": url, "keyframe_0_index": 0}).encode()
        return await self.call("POST", f"/queue/{ENDPOINT}", body, key, **headers)


def relative(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.path}?{parts.query}" if parts.query else parts.path


def refused(answer: Raw, *statuses: int) -> None:
    assert SECRET not in answer.body
    assert answer.status in (statuses or (0, 400, 401, 403, 404, 405, 413, 414, 422)), (answer.status, answer.body[:300])


Case = Callable[[World], Awaitable[None]]
CASES: dict[str, Case] = {}


def case(name: str, check: Case) -> None:
    assert name not in CASES, name
    CASES[name] = check


# Paths: nothing but files under their own names is read.


async def _path(path: str, method: str, world: World) -> None:
    filled = path.replace("{hidden}", world.hidden.rpartition("/")[0].rpartition("/")[2]).replace("{open}", world.open_)
    refused(await world.call(method, filled))


PATHS = [
    "/files/../home-secret",
    "/files/..%2fhome-secret",
    "/files/%2e%2e/home-secret",
    "/files/%2e%2e%2fhome-secret",
    "/files/%252e%252e%252fhome-secret",
    "/files/..%5chome-secret",
    "/files/..\\home-secret",
    "/files/....//home-secret",
    "/files/.%00./home-secret",
    "/files/%c0%ae%c0%ae/home-secret",
    "/files/%e0%80%ae%e0%80%ae/home-secret",
    "/files//etc/passwd",
    "/files/%2fetc%2fpasswd",
    "/files/file:///etc/passwd",
    "/files/b/../../home-secret",
    "/files/b/%2e%2e/%2e%2e/home-secret",
    "/files/b/{hidden}/../../../home-secret",
    "/files/b/{hidden}/..%2f..%2f..%2fhome-secret",
    "/files/b/{hidden}/%2e%2e%2fx.png",
    "/files/b/{hidden}",
    "/files/b/{hidden}/",
    "/files/b/{hidden}/x.png/",
    "/files/b/{hidden}/x.png%00",
    "/files/b/{hidden}/x.png%0a",
    "/files/b/{hidden}/x.png;a=b",
    "/files/b/{hidden}/X.PNG",
    "/files/B/{hidden}/x.png",
    "/files/./b/{hidden}/x.png",
    "/files/b//{hidden}/x.png",
    "/files/b/{hidden}/x.png/multipart/x/1",
    "/files/{hidden}/x.png",
    "/cdn/files/b/{hidden}/x.png",
    "/cdn/files/../files/b/{hidden}/x.png",
    "/cdn/../files/b/{hidden}/x.png",
    "/files/inputs/11111111111111111111111111111111/data",
    "/files/inputs%2f11111111111111111111111111111111%2fdata",
    "/files/parts/11111111111111111111111111111111/1",
    "/files/checkpoints/0190aaaa-0000-7000-8000-000000000001/step.safetensors",
    "/files/incomplete/left",
    "/files/b/" + "1" * 31 + "١/x.png",
    "/files/b/" + "A" * 32 + "/x.png",
    "/files/" + "a/" * 3000,
    "http://v3.fal.media/files/b/{hidden}/x.png",
]
for path in PATHS:
    encoded = path if path.isascii() else quote(path, safe="/%")
    case(f"path {path[:60]}", partial(_path, encoded, "GET"))
for path in ("/files/b/{hidden}/x.png", "/files/../home-secret", "/files/b/../../home-secret"):
    for method in ("HEAD", "POST", "DELETE", "PATCH", "PUT"):
        case(f"path {method} {path}", partial(_path, path, method))


# Names: what a caller calls a file is no path and no header.


async def _name(file_name: str, by: str, world: World) -> None:
    if by == "initiate":
        path = await world.uploaded(world.b, b"x", {"file_name": file_name})
    else:
        answer = await world.call("POST", "/files/upload", b"x", world.b, content_type="image/png", x_fal_file_name=file_name)
        if answer.status in (0, 400):
            return
        path = relative(json.loads(answer.body)["access_url"])
    assert re.fullmatch(r"/files/b/[0-9a-f]{32}/[A-Za-z0-9_-]{1,64}\.png", path), path
    found = await world.call("GET", path)
    assert found.status == 200
    assert re.fullmatch(r'inline; filename="[A-Za-z0-9_-]{1,64}\.png"', found.header("content-disposition") or "")
    assert found.header("set-cookie") is None


NAMES = [
    "../../../etc/passwd",
    "..\\..\\windows\\win.ini",
    "/etc/passwd",
    "a/../../b.png",
    "..",
    ".",
    "",
    ".htaccess",
    "%2e%2e%2fx.png",
    "x.png%00.html",
    "x.html",
    'x.png"; filename="y.html',
    "x.png; filename=y.html",
    "con",
    "x" * 900,
    "-rf",
    "$(id).png",
    "{{7*7}}.png",
    "' OR 1=1 --",
]
for name in NAMES:
    case(f"name {name[:40]!r}", partial(_name, name, "initiate"))
    case(f"name by header {name[:40]!r}", partial(_name, name, "header"))
for name in ("x\r\nSet-Cookie: a=b", "x\0.png", "\u202egnp.exe", "日本/../..", "x\n.png", "\ud83d\ude00.png"):
    case(f"name {name!r}", partial(_name, name, "initiate"))


# Content: nothing that is uploaded runs in a browser as a page of this origin.


async def _content(content_type: str, data: bytes, world: World) -> None:
    body = json.dumps({"content_type": content_type, "file_name": "x.html"}).encode()
    answer = await world.call("POST", "/rest/storage/upload/initiate", body, world.b)
    if answer.status == 422:
        return
    urls = json.loads(answer.body)
    assert (await world.call("PUT", relative(urls["upload_url"]), data)).status == 200
    for method, headers in (("GET", {}), ("GET", {"range": "bytes=0-3"}), ("GET", {"range": "bytes=0-1,3-4"}), ("HEAD", {})):
        found = await world.call(method, relative(urls["file_url"]), **headers)
        assert found.status in (200, 206)
        assert found.header("x-content-type-options") == "nosniff"
        policy = found.header("content-security-policy") or ""
        assert "sandbox" in policy
        assert "allow-" not in policy
        assert "default-src 'none'" in policy
        served = found.header("content-type") or ""
        is_inline = (found.header("content-disposition") or "").startswith("inline")
        assert not is_inline or content_type.partition(";")[0].lower() in INLINE
        assert not ACTIVE.search(served) or served.startswith("multipart/byteranges"), served
        assert found.header("access-control-allow-credentials") is None


SCRIPT = b"<script>alert(document.domain)</script>"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>'
TYPES = [
    "text/html",
    "TEXT/HTML",
    "text/html;charset=utf-7",
    "application/xhtml+xml",
    "image/svg+xml",
    "image/SVG+XML; charset=utf-8",
    "text/xml",
    "application/xml",
    "application/rss+xml",
    "text/xsl",
    "text/javascript",
    "application/javascript",
    "application/ecmascript",
    "text/css",
    "text/x-component; x=html",
    "multipart/x-mixed-replace; boundary=x",
    "message/rfc822",
    "application/x-shockwave-flash",
    "text/plain",
    "application/pdf",
    "image/png, text/html",
    "image/png\r\nX-Injected: 1",
    "image/png\0",
    "image/png;",
    "text/html image/png",
    "html",
    "",
    "x/" + "y" * 300,
]
for content_type in TYPES:
    case(f"content of type {content_type[:40]!r}", partial(_content, content_type, SCRIPT))
DISGUISED = {
    "html": SCRIPT,
    "svg": SVG,
    "png and html": b"\x89PNG\r\n\x1a\n" + SCRIPT,
    "gif and script": b"GIF89a/*" + b"\0" * 8 + b"*/=1;alert(1)",
    "jpeg and html": b"\xff\xd8\xff\xe0\x00\x10JFIF<!--" + SCRIPT,
    "mp4 and html": b"\0\0\0\x18ftypmp42" + SCRIPT,
    "pdf": b"%PDF-1.7\n1 0 obj<</S/JavaScript/JS(app.alert(1))>>",
    "utf-16 html": SCRIPT.decode().encode("utf-16"),
    "zip": b"PK\x03\x04" + SCRIPT,
    "shell script": b"#!/bin/sh\nid",
}
for name, data in DISGUISED.items():
    case(f"{name} as a picture", partial(_content, "image/png", data))
    case(f"{name} as a video", partial(_content, "video/mp4", data))


# Tokens and signatures.


def forged(token: str, header: dict[str, Any] | None = None, **claims: Any) -> str:
    """A token with other claims under the old signature. None removes a claim."""
    parts = token.split(".")
    for i, changes in ((0, header or {}), (1, claims)):
        old = json.loads(base64.urlsafe_b64decode(parts[i] + "=="))
        new = {name: value for name, value in (old | changes).items() if value is not None}
        parts[i] = base64.urlsafe_b64encode(json.dumps(new).encode()).rstrip(b"=").decode()
    return ".".join(parts)


Forge = Callable[[World, dict[str, str], str], Awaitable[str]]


async def _signature(forge: Callable[[World, str, str], Awaitable[str]], parts: bool, world: World) -> None:
    """`forge` is given the signature of an upload of `a`, and that of another one of `b`."""
    form = "initiate-multipart" if parts else "initiate"
    urls, others = await world.initiated(world.a, form), await world.initiated(world.b, form)
    path, _, good = urls["upload_url"].partition("?upload=")
    bad = await forge(world, good, others["upload_url"].partition("?upload=")[2])
    for method, ending in (("PUT", "/1"), ("POST", "/complete")) if parts else (("PUT", ""),):
        refused(await world.call(method, f"{path}{ending}?upload={bad}", SECRET), 401, 403, 404)
    assert (await world.call("GET", urls["file_url"], key=world.a)).status == 404


async def _changed(change: dict[str, Any], world: World, good: str, _: str) -> str:
    return forged(good, **change)


async def _fixed(text: str, *_: object) -> str:
    return text


async def _of_another(_: World, __: str, other: str) -> str:
    return other


async def _key(world: World, *_: str) -> str:
    return quote(world.a)


async def _cdn_token(world: World, *_: str) -> str:
    return await world.cdn(world.a)


async def _without(_: World, good: str, __: str) -> str:
    return good.rpartition(".")[0] + "."


async def _cut(_: World, good: str, __: str) -> str:
    return good[:-3]


async def _twice(_: World, good: str, other: str) -> str:
    return f"{good}&upload={other}"


async def _open_secret(world: World, good: str, _: str) -> str:
    """Signed with what an open service would sign with."""
    ticket = json.loads(base64.urlsafe_b64decode(good.split(".")[1] + "=="))
    named = {field: ticket[field] for field in ("name", "content_type", "max_bytes", "exact", "owner")}
    return tokens.issue_ticket(await world.store.keys.open_secret(), tokens.Ticket(**named), 60)


FORGERIES: dict[str, Callable[[World, str, str], Awaitable[str]]] = {
    "another name": partial(_changed, {"name": "b/" + "0" * 32 + "/x.png"}),
    "more bytes": partial(_changed, {"max_bytes": 10**12}),
    "another type": partial(_changed, {"content_type": "text/html"}),
    "another owner": partial(_changed, {"sub": "someone"}),
    "a later end": partial(_changed, {"exp": 10**11}),
    "no end": partial(_changed, {"exp": None}),
    "another use": partial(_changed, {"use": "cdn"}),
    "no algorithm": partial(_changed, {"header": {"alg": "none"}}),
    "another key": partial(_changed, {"header": {"kid": str(uuid4())}}),
    "the open key": partial(_changed, {"header": {"kid": "00000000-0000-0000-0000-000000000000"}}),
    "the open secret": _open_secret,
    "no signature": _without,
    "a cut signature": _cut,
    "that of another upload": _of_another,
    "two of them": _twice,
    "the key itself": _key,
    "a token for the CDN": _cdn_token,
    "nothing": partial(_fixed, ""),
    "a path": partial(_fixed, "../../x"),
    "much": partial(_fixed, "a" * 15_000),
    "dots": partial(_fixed, ".." + "." * 50),
    "a null": partial(_fixed, "%00"),
}
for name, forge in FORGERIES.items():
    case(f"signature with {name}", partial(_signature, forge, False))
    case(f"signature of parts with {name}", partial(_signature, forge, True))


async def _bearer(path: str, method: str, token: str, world: World) -> None:
    """A token where it does not count."""
    page = await world.call("POST", "/rest/tokens/", json.dumps({"allowed_apps": [ALIAS]}).encode(), world.a)
    upload = (await world.initiated(world.a))["upload_url"].partition("?upload=")[2]
    shown = {"page": json.loads(page.body), "cdn": await world.cdn(world.a), "upload": upload}[token]
    target = path.replace("{hidden}", world.hidden)
    body = b'{"prompt": "x"}'
    refused(await world.call(method, target, body, authorization=f"Bearer {shown}"), 401, 404)
    refused(await world.call(method, f"{target}?fal_jwt_token={shown}", body), 401, 403, 404) if token != "page" else None


for token in ("page", "upload"):
    for path in ("/files/upload", "/files/upload/multipart", "/rest/storage/upload/initiate", "/rest/storage/auth/token"):
        case(f"{token} token at {path}", partial(_bearer, path, "POST", token))
for path in ("/rest/storage/upload/initiate", "/rest/storage/auth/token", "/rest/tokens/", f"/queue/{ENDPOINT}"):
    case(f"CDN token at {path}", partial(_bearer, path, "POST", "cdn"))
case("CDN token reads no hidden file", partial(_bearer, "{hidden}", "GET", "cdn"))
case("page token reads no hidden file", partial(_bearer, "{hidden}", "GET", "page"))
case("upload token reads no hidden file", partial(_bearer, "{hidden}", "GET", "upload"))


# Other callers' files.


async def _read(headers: dict[str, str], method: str, world: World) -> None:
    for path, status in ((world.hidden, 404), (world.forbidden, 403)):
        answer = await world.call(method, path, key=world.b, **headers)
        refused(answer, status)
        assert answer.header("etag") is None


READS: list[dict[str, str]] = [
    {},
    {"range": "bytes=0-0"},
    {"range": "bytes=0-0,1-1"},
    {"range": "bytes=999-"},
    {"if_none_match": "*"},
    {"if_match": "*"},
    {"host": "v3.fal.media"},
    {"host": "queue.fal.run"},
    {"x_fal_target_url": "https://v3.fal.media/files/b"},
    {"x_forwarded_host": "v3.fal.media"},
    {"x_original_url": "/files/b"},
    {"cookie": "fal=1"},
]
for headers in READS:
    case(f"reading with {headers}", partial(_read, headers, "GET"))
case("reading the head", partial(_read, {}, "HEAD"))


async def _by_proxy(host: str, world: World) -> None:
    target = f"https://{host}{world.hidden}"
    refused(await world.call("GET", "/api/fal/proxy", key=world.b, x_fal_target_url=target), 400, 404)


for host in (
    "v3.fal.media",
    "rest.fal.ai",
    "queue.fal.run",
    "evil.example",
    "v3.fal.media@evil.example",
    "v3.fal.media.evil.example",
):
    case(f"reading by the proxy from {host}", partial(_by_proxy, host))


async def _as_input(form: str, world: World) -> None:
    for path in (world.hidden, world.forbidden):
        url = form.format(port=world.port, path=path, name=path.removeprefix("/files/"))
        answer = await world.submit(world.b, url)
        if answer.status == 200:  # it is not known here, so the download would be refused later: nothing of ours is referred to
            job_input = await world.store.database.fetch(
                "SELECT input::text FROM jobs WHERE id = $1", json.loads(answer.body)["request_id"]
            )
            assert "kept:" not in job_input[0]["input"]
        else:
            refused(answer, 422)


for form in (
    "http://127.0.0.1:{port}{path}",
    "http://127.0.0.1:{port}/cdn{path}",
    "https://v3.fal.media{path}",
    "https://v3.fal.media{path}?x",
    "HTTPS://V3.FAL.MEDIA{path}",
    "https://user:pw@v3.fal.media{path}",
    "https://v3.fal.media/x/..{path}",
    "https://other.example{path}",
    "kept:{name}",
    "file://{path}",
    "{path}",
    "{name}",
):
    case(f"input {form}", partial(_as_input, form))


async def _others_upload(how: str, world: World) -> None:
    urls = await world.initiated(world.a, "initiate-multipart")
    path = urls["file_url"]
    begun = await world.call("POST", "/files/upload/multipart", key=world.a, content_type="image/png")
    upload_id, url = json.loads(begun.body)["uploadId"], relative(json.loads(begun.body)["access_url"])
    token_a, token_b = await world.cdn(world.a), await world.cdn(world.b)
    part = {"partNumber": 1, "etag": "0" * 64}
    listed = json.dumps({"parts": [part]}).encode()
    answers = {
        "its id with another token": lambda: world.call(
            "PUT", f"{url}/multipart/{upload_id}/1", b"x", authorization=f"Bearer {token_b}"
        ),
        "its id without a token": lambda: world.call("PUT", f"{url}/multipart/{upload_id}/1", b"x"),
        "its id at another file": lambda: world.call(
            "PUT", f"{path}/multipart/{upload_id}/1", b"x", authorization=f"Bearer {token_a}"
        ),
        "its path with another key": lambda: world.call("PUT", f"{url}/1", b"x", key=world.b),
        "its end with another token": lambda: world.call(
            "POST", f"{url}/multipart/{upload_id}/complete", listed, authorization=f"Bearer {token_b}"
        ),
        "its end without parts": lambda: world.call(
            "POST", f"{url}/multipart/{upload_id}/complete", listed, authorization=f"Bearer {token_a}"
        ),
        "over a finished file": lambda: world.call("PUT", world.open_, b"x", key=world.b),
        "as a part of a finished file": lambda: world.call("PUT", f"{world.open_}/1", b"x", key=world.b),
    }
    refused(await answers[how]())
    assert (await world.call("GET", world.open_)).body == b"for everybody"


for how in (
    "its id with another token",
    "its id without a token",
    "its id at another file",
    "its path with another key",
    "its end with another token",
    "its end without parts",
    "over a finished file",
    "as a part of a finished file",
):
    case(f"another's upload: {how}", partial(_others_upload, how))


async def _part_number(number: str, world: World) -> None:
    path, _, signature = (await world.initiated(world.b, "initiate-multipart"))["upload_url"].partition("?")
    refused(await world.call("PUT", f"{path}/{number}?{signature}", b"x"), 400, 404, 405)


for number in ("0", "-1", "10001", "99999999", "1e1", "0x1", "%31%00", "..%2f1", "%D9%A1", "complete", "%20"):
    case(f"part number {number}", partial(_part_number, number))


# Bodies.


async def _body(headers: str, body: bytes, world: World) -> None:
    """A body that is too long, too short, too slow or of no length; `headers` follow the request's line."""
    urls = await world.initiated(world.b)
    head = f"PUT {urls['upload_url']} HTTP/1.1\nhost: 127.0.0.1:{world.port}\nconnection: close\n{headers}"
    refused(await world.raw(head, body), 0, 400, 403, 408, 411, 413)
    assert (await world.call("GET", urls["file_url"])).status == 404


BODIES = {
    "too long": (f"content-length: {MAX_BYTES + 1}", b"x" * (MAX_BYTES + 1)),
    "said to be enormous": ("content-length: 99999999999999999999", b"x"),
    "of negative length": ("content-length: -1", b"x"),
    "of signed length": ("content-length: +1", b"x"),
    "of two lengths": ("content-length: 1\ncontent-length: 2", b"xx"),
    "of a list of lengths": ("content-length: 1, 2", b"xx"),
    "of odd length": ("content-length: 0x10", b"x" * 16),
    "of no length": ("x: y", b"x"),
    "in chunks": ("transfer-encoding: chunked", b"1\r\nx\r\n0\r\n\r\n"),
    "in chunks with a length": ("transfer-encoding: chunked\ncontent-length: 1", b"1\r\nx\r\n0\r\n\r\n"),
    "in odd chunks": ("transfer-encoding: xchunked\ncontent-length: 4", b"0\r\n\r\n"),
    "that stops": ("content-length: 1000", b"x" * 10),
    "of another type": ("content-type: text/html\ncontent-length: 1", b"x"),
    "of no type": ("content-type: nonsense\ncontent-length: 1", b"x"),
}
for name, (headers, body) in BODIES.items():
    case(f"body {name}", partial(_body, headers, body))


async def _crawling(world: World) -> None:
    """A byte now and then, for ever."""
    urls = await world.initiated(world.b)
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    head = f"PUT {urls['upload_url']} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 90000\r\n\r\n"
    writer.write(head.encode())
    reading = asyncio.create_task(reader.read())
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not reading.done():
                writer.write(b"x")
                await asyncio.sleep(0.05)
        assert b" 400 " in reading.result()[:20]
    finally:
        writer.close()


case("body that crawls", _crawling)


async def _json(path: str, body: bytes, world: World) -> None:
    if path == "complete":
        target, _, signature = (await world.initiated(world.b, "initiate-multipart"))["upload_url"].partition("?")
        answer = await world.call("POST", f"{target}/complete?{signature}", body)
    else:
        answer = await world.call("POST", path, body, world.b)
    refused(answer, 0, 400, 413, 422)
    assert len(answer.body) < 10_000


JSONS = {
    "nothing": b"[]",
    "nested": b"[" * 15_000,
    "half": b'{"content_type": ',
    "a string": b'"x"',
    "too long": b'{"file_name": "' + b"x" * 30_000 + b'"}',
    "a long name": b'{"file_name": "' + b"x" * 5_000 + b'"}',
    "a surrogate": b'{"file_name": "\\ud800"}',
    "a negative size": b'{"file_size": -1}',
    "a broken size": b'{"file_size": 1.5}',
    "a huge size": b'{"file_size": 1e400}',
    "a size above all": b'{"file_size": 9223372036854775808}',
    "a size as text": b'{"file_size": "1"}',
    "a size as truth": b'{"file_size": true}',
    "a list of types": b'{"content_type": ["image/png"]}',
}
for name, body in JSONS.items():
    case(f"request with {name}", partial(_json, "/rest/storage/upload/initiate", body))
for name, body in {
    "nothing": b"",
    "no parts": b'{"parts": []}',
    "many parts": json.dumps({"parts": [{"partNumber": 1, "etag": ""}] * 20_000}).encode(),
    "empty parts": json.dumps({"parts": [{}] * 9_000}).encode(),
    "a part twice": json.dumps({"parts": [{"partNumber": 1, "etag": "0"}] * 2}).encode(),
    "a long etag": json.dumps({"parts": [{"partNumber": 1, "etag": "0" * 10_000}]}).encode(),
    "a megabyte and more": b'{"parts": "' + b"x" * 1_300_000 + b'"}',
}.items():
    case(f"list with {name}", partial(_json, "complete", body))


# Hosts, ranges and the like.


async def _header(method: str, path: str, headers: dict[str, str], world: World) -> None:
    answer = await world.call(method, path.replace("{open}", world.open_), key=world.b, **headers)
    assert answer.status < 500, answer.body
    assert len(answer.body) < 5_000
    assert "x-injected" not in answer.head.lower()


HEADERS = [
    ("GET", "{open}", {"range": "bytes=" + ",".join(["0-0"] * 2000)}),
    ("GET", "{open}", {"range": "bytes=" + ",".join(f"{i}-{i}" for i in range(0, 400, 2))}),
    ("GET", "{open}", {"range": "bytes=99999999999999999999-"}),
    ("GET", "{open}", {"range": "bytes=-99999999999999999999"}),
    ("GET", "{open}", {"range": "bytes=--1"}),
    ("GET", "{open}", {"range": "bytes=٣-"}),
    ("GET", "{open}", {"if_none_match": '"' * 8000}),
    ("GET", "{open}", {"if_none_match": "W/" * 4000}),
    ("GET", "{open}", {"host": "v3.fal.media:abc"}),
    ("POST", "/storage/auth/token", {"host": "rest.fal.ai:abc"}),
    ("POST", "/storage/auth/token", {"host": "rest.fal.ai:8/x?y"}),
    ("POST", "/storage/auth/token", {"host": "rest.fal.ai@evil.example"}),
    ("POST", "/storage/upload/initiate", {"host": "rest.fal.ai:80%0d%0aX-Injected:1"}),
    ("POST", "/api/fal/proxy", {"x_fal_target_url": "https://rest.fal.ai:99999/storage/auth/token"}),
    ("POST", "/api/fal/proxy", {"x_fal_target_url": "https://rest.fal.ai/storage/../../files/upload"}),
    ("POST", "/api/fal/proxy", {"x_fal_target_url": "file:///etc/passwd"}),
    ("POST", "/rest/storage/upload/initiate", {"x_fal_object_lifecycle": "[" * 7000}),
    ("POST", "/rest/storage/upload/initiate", {"x_fal_object_lifecycle": '{"expiration_duration_seconds": 1e400}'}),
    ("POST", "/rest/storage/upload/initiate", {"x_fal_object_lifecycle": '{"initial_acl": {"default": "allow\\u0000"}}'}),
]
for i, (method, path, headers) in enumerate(HEADERS):
    case(
        f"header {i} {next(iter(headers.items()))[1][:30]}",
        partial(_header, method, path, {n: v.encode().decode("latin-1") for n, v in headers.items()}),
    )


@asynccontextmanager
async def attacked(database: str, home: Path) -> AsyncIterator[World]:
    settings = Settings(home=home, auth="keys", uploads=UploadSettings(max_bytes=MAX_BYTES))
    store = await JobStore.open(database)
    try:
        async with listening(create_app(settings, store)) as url:
            world = World(int(url.rpartition(":")[2]), store, FileStore(settings.files_url))
            world.a, world.b = await store.keys.create("a"), await store.keys.create("b")
            forbid = HIDE["x-fal-object-lifecycle"].replace("hide", "forbid")
            world.hidden = await world.uploaded(world.a, SECRET, **HIDE)
            world.forbidden = await world.uploaded(world.a, SECRET, x_fal_object_lifecycle=forbid)
            world.open_ = await world.uploaded(world.a, b"for everybody")
            (home / HOME_FILE).write_bytes(SECRET)
            root = Path(settings.files_url)
            for name in (
                "inputs/11111111111111111111111111111111/data",
                "parts/11111111111111111111111111111111/1",
                "checkpoints/0190aaaa-0000-7000-8000-000000000001/step.safetensors",
                "incomplete/left",
            ):
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(SECRET)
            yield world
    finally:
        await store.close()


async def outcomes(database: str, home: Path) -> dict[str, str | None]:
    """Case -> why it succeeded; None: it did not. "": what happened to the service."""

    async def outcome(check: Case, world: World, room: asyncio.Semaphore) -> str | None:
        async with room:
            try:
                await check(world)
            except Exception as exc:
                return f"{type(exc).__name__}: {exc}"
            return None

    async with attacked(database, home) as world:
        room = asyncio.Semaphore(16)
        found = await asyncio.gather(*(outcome(check, world, room) for check in CASES.values()))
        return dict(zip(CASES, found, strict=True)) | {"": await outcome(_still_renders, world, room)}


async def _still_renders(world: World) -> None:
    assert (await world.call("GET", world.open_)).body == b"for everybody"
    assert (await world.call("GET", world.hidden, key=world.a)).body == SECRET
    await world.store.database.fetch("DELETE FROM jobs")
    async with (
        working(world.store, world.files, 0.01),
        httpx.AsyncClient(headers={"authorization": f"Key {world.a}"}, timeout=PATIENCE_S) as client,
    ):
        base = f"http://127.0.0.1:{world.port}"
        links = (await client.post(f"{base}/queue/{ENDPOINT}", json={"prompt": "x"})).json()
        async with asyncio.timeout(PATIENCE_S):
            while (await client.get(links["status_url"])).status_code == 202:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert (await client.get(links["response_url"])).status_code == 200


@pytest.fixture(scope="module")
def found(postgres: str) -> Iterator[dict[str, str | None]]:
    name = f"hostile_{uuid4().hex}"
    asyncio.run(execute(postgres, f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}"))
    with TemporaryDirectory(prefix="reelray-") as home, pytest.MonkeyPatch.context() as patched:
        patched.setattr(uploads, "IDLE_S", 1.0)
        yield asyncio.run(outcomes(of_database(postgres, name), Path(home)))
    asyncio.run(execute(postgres, f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.mark.parametrize("name", CASES)
def test_an_attack_has_no_success(name: str, found: dict[str, str | None]) -> None:
    assert found[name] is None


def test_the_service_still_renders_and_nothing_has_changed(found: dict[str, str | None]) -> None:
    assert found[""] is None


def test_there_are_enough_attacks() -> None:
    assert len(CASES) >= 200
