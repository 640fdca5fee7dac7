"""Downloads from callers' URLs, with limits on their size, their time and, above all, on the addresses that they may reach.

A caller's URL is fetched from inside the operator's network. So every hop's host is resolved here, all its addresses must be
public, and the connection goes to an address that was checked, not to the name: if the name were resolved again, it could by then
point elsewhere (DNS rebinding). TLS still verifies the server's certificate for the name.

A download is written to disk as it arrives: several large videos at once would take too much of a replica's memory.

`send` makes the same checks for other requests to callers' URLs (`webhooks/courier.py`).
"""

import asyncio
import base64
import binascii
import functools
import ipaddress
import socket
import ssl
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote_to_bytes

import httpx

from deployments.settings import FetchSettings
from engines.errors import FileDownloadError, FileTooLarge, StorageFailed
from engines.temporary import temporary_folder

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

USER_AGENT = "reelray"
CONNECT_TIMEOUT_S = 10.0
"""After it, the host's next address is tried."""
DECODED = {"gzip": "gzip", "x-gzip": "gzip", "deflate": "deflate"}
"""Content codings that are decoded, and httpx's names of them. They expand at most 1032-fold, so one network chunk of 64 kB
decodes to at most 66 MB before its size is checked. The others and combined ones have no such bound, and no image or video needs
them."""
CODINGS = DECODED.keys() | {"aes128gcm", "br", "compress", "dcb", "dcz", "exi", "pack200-gzip", "x-compress", "zstd"}
"""IANA's HTTP Content Coding Registry, but for `identity`. Other names say nothing about the bytes: S3 tools leave
`aws-chunked` on objects, others write a charset."""

CONNECTION_ERRORS = (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError, ValueError, OverflowError, ExceptionGroup)
"""What `send` can raise because of a URL or its server, besides `Refused`. Callers must not see the texts, which may contain
addresses. ValueError: for a host that IDNA refuses. OverflowError, ExceptionGroup: for a port above 65535."""

NOT_PUBLIC = "The host does not resolve to a public address."
"""Also for a name that does not resolve at all: callers must not learn which names exist in the operator's network."""

_NAT64 = ipaddress.ip_network("64:ff9b::/96")


@contextmanager
def download_folder() -> Iterator[Path]:
    """A temporary folder, deleted at the end with everything in it. Raises `StorageFailed`."""
    with ExitStack() as stack:
        with _storing():
            folder = stack.enter_context(temporary_folder())
        yield folder


async def download(url: str, settings: FetchSettings, field: str, into: Path) -> None:
    """Writes the content of an http(s) URL or a base64 data URI to the file `into`. After a failure there is no such file.

    field: the input field that held `url`, for the error's loc. Raises `FileDownloadError`, and `FileTooLarge` as soon as
    the size is known to be above `settings.max_bytes`: both tell the caller what is wrong. Raises `StorageFailed` if our own
    disk does not take the file.
    """
    with _new_file(into) as file:
        await _download(url, settings, ("body", field), file)


async def download_all(urls: Mapping[str, str], settings: FetchSettings, folder: Path) -> dict[str, Path]:
    """Downloads several files at once. urls: field -> URL. Returns field -> file in `folder`; raises the first error."""
    files = {field: folder / field for field in urls}
    try:
        async with asyncio.TaskGroup() as group:
            for field, url in urls.items():
                group.create_task(download(url, settings, field, files[field]))
    except ExceptionGroup as group_error:
        raise group_error.exceptions[0] from None
    return files


class Refused(Exception):
    """The file is not downloaded, or the request not sent; the text tells the caller why."""


class TooLarge(Exception):
    """The file is larger than allowed."""


@contextmanager
def _storing() -> Iterator[None]:
    """Turns our own disk's errors into `StorageFailed`, which is tried again."""
    try:
        yield
    except OSError as exc:
        raise StorageFailed from exc


@contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """A new file to write; it is deleted if the block fails."""
    with _storing():
        try:
            with path.open("wb") as file:
                yield file
        except BaseException:
            path.unlink(missing_ok=True)
            raise


async def _write(file: BinaryIO, data: bytes | bytearray) -> None:
    with _storing():
        await asyncio.to_thread(file.write, data)


async def _download(url: str, settings: FetchSettings, loc: tuple[str, str], file: BinaryIO) -> None:
    """`download` into an open file. loc: for the errors."""
    with told_to_caller(settings, loc):
        if url[:5].lower() == "data:":
            await _write(file, await asyncio.to_thread(decoded_data_uri, [url.encode("ascii", "replace")], settings.max_bytes))
        else:
            async with asyncio.timeout(settings.timeout_s):
                await _request(url, settings, file)


@contextmanager
def told_to_caller(settings: FetchSettings, loc: tuple[str, str]) -> Iterator[None]:
    """Turns what can be wrong with a caller's file into errors that say so, with the field in `loc`."""
    try:
        yield
    except TooLarge as exc:
        message = f"The file is larger than {settings.max_bytes} bytes."
        raise FileTooLarge(message, loc, {"max_size": settings.max_bytes}) from exc
    except Refused as exc:
        raise FileDownloadError(f"The file could not be downloaded: {exc}", loc) from exc
    except TimeoutError as exc:
        message = f"The file could not be downloaded: it took longer than {settings.timeout_s:g} s."
        raise FileDownloadError(message, loc) from exc
    except CONNECTION_ERRORS as exc:
        raise FileDownloadError("The file could not be downloaded: the connection failed.", loc) from exc


def decoded_data_uri(pieces: Iterable[bytes], max_bytes: int) -> bytearray:
    """RFC 2397, with the base64 that browsers accept (WHATWG "forgiving-base64"): line breaks inside, no padding.

    pieces: of the URI, the first one with its comma. Each is decoded by itself, because decoding holds the GIL: 60 MB at once
    would stop the event loop for half a second. Raises what `told_to_caller` takes.
    """
    incoming = iter(pieces)
    head, comma, first = next(incoming, b"").partition(b",")
    if not comma or not head.lower().endswith(b";base64"):
        raise Refused("a data URI must be of the form data:<type>;base64,<data>.")
    found, left, ended = bytearray(), b"", False
    try:
        for piece in _unquoted(chain([first], incoming)):
            encoded = piece.translate(None, b" \t\n\f\r")
            if ended and encoded.strip(b"="):
                raise binascii.Error("data after the padding")
            ended = ended or b"=" in encoded
            encoded = left + encoded.rstrip(b"=")
            if len(found) + len(encoded) * 3 // 4 > max_bytes:
                raise TooLarge
            whole = len(encoded) - len(encoded) % 4
            found += base64.b64decode(encoded[:whole], validate=True)
            left = encoded[whole:]
        found += base64.b64decode(left + b"=" * (-len(left) % 4), validate=True)
    except binascii.Error as exc:
        raise Refused("the data URI is not valid base64.") from exc
    return found


def _unquoted(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Decodes escapes such as "%2B" and "%3D": some callers URL-encode a whole data URI."""
    left = b""
    for piece in pieces:
        whole = left + piece
        cut = whole.rfind(b"%", -2)  # an escape that goes on in the next piece
        whole, left = (whole, b"") if cut < 0 else (whole[:cut], whole[cut:])
        yield unquote_to_bytes(whole) if b"%" in whole else whole
    yield left


async def _request(url: str, settings: FetchSettings, file: BinaryIO) -> None:
    """Follows redirects by hand, so that each hop is checked like the first."""
    hop = httpx.URL(url)
    async with new_client() as client:
        for _ in range(settings.max_redirects + 1):
            response = await send(client, "GET", hop, {"accept": "*/*"}, allow_private=settings.allow_private)
            try:
                if response.has_redirect_location:
                    hop = hop.join(response.headers["location"])
                    continue
                if response.status_code != 200:
                    raise Refused(f"the server answered with status {response.status_code}.")
                return await _read(response, settings.max_bytes, file)
            finally:
                await response.aclose()
    raise Refused(f"more than {settings.max_redirects} redirects.")


def new_client() -> httpx.AsyncClient:
    """A client for `send`. Not to be shared between hosts: an open connection is used again for the same address, whatever name
    its certificate was verified for. Only connecting has a timeout; the caller sets one for the whole."""
    timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
    # trust_env=False: a proxy from the environment would resolve the name again, without our checks
    return httpx.AsyncClient(trust_env=False, verify=_tls(), timeout=timeout, follow_redirects=False)


async def send(
    client: httpx.AsyncClient,
    method: str,
    url: httpx.URL,
    headers: Mapping[str, str],
    content: bytes | None = None,
    *,
    allow_private: bool,
) -> httpx.Response:
    """The response, its body still unread, from the first of the host's addresses that accepts a connection.

    It must be closed. Redirects are not followed. allow_private: addresses in the operator's own network are allowed.
    Raises `Refused` and `CONNECTION_ERRORS`.
    """
    if url.scheme not in ("http", "https") or not url.host:
        raise Refused("only http and https URLs are fetched.")
    host = url.raw_host.decode("ascii")
    failure: httpx.TransportError | None = None
    for address in await _resolve(host, url.port or {"http": 80, "https": 443}[url.scheme], allow_private):
        request = client.build_request(
            method,
            url.copy_with(host=str(address)),
            headers={
                "host": url.netloc.decode("ascii"),
                "user-agent": USER_AGENT,
                "accept-encoding": "identity",
                **headers,
            },
            content=content,
            extensions={"sni_hostname": host},
        )
        try:
            return await client.send(request, stream=True)
        except (httpx.ConnectError, httpx.ConnectTimeout) as exc:
            failure = exc
    assert failure is not None
    raise failure


async def _resolve(host: str, port: int, allow_private: bool) -> list[IPAddress]:
    """All addresses of `host`. The resolver also normalizes odd spellings of addresses ("127.1", "0x7f000001")."""
    try:
        look_up = functools.partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(_resolvers(), look_up)
    except (OSError, UnicodeError) as exc:
        raise Refused(NOT_PUBLIC) from exc
    addresses = list(dict.fromkeys(ipaddress.ip_address(entry[4][0]) for entry in found))
    if not allow_private and not all(is_public(address) for address in addresses):
        raise Refused(NOT_PUBLIC)
    return addresses


def is_public(address: IPAddress) -> bool:
    """Whether an address is on the public Internet. Of an IPv6 address that contains an IPv4 one, the latter counts."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
        if inner is not None:
            return is_public(inner)
        if address.is_site_local:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


async def _read(response: httpx.Response, max_bytes: int, file: BinaryIO) -> None:
    """Writes a response's decoded body to `file`."""
    named = response.headers.get_list("content-encoding", split_commas=True)
    codings = [name for name in map(str.lower, named) if name in CODINGS]
    if len(codings) > 1 or not DECODED.keys() >= set(codings):
        raise Refused(f"its content encoding, {', '.join(codings)}, is not supported.")
    response.headers["content-encoding"] = "".join(DECODED[name] for name in codings)  # httpx decodes by it
    declared = response.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise TooLarge
    size = 0
    async for chunk in response.aiter_bytes():
        size += len(chunk)
        if size > max_bytes:
            raise TooLarge
        await _write(file, chunk)


@functools.cache
def _resolvers() -> ThreadPoolExecutor:
    """Threads for looking up names, instead of asyncio's few: a name server that does not answer blocks one for half a minute,
    and must not delay look-ups of other names."""
    return ThreadPoolExecutor(256, "resolver")


@functools.cache
def _tls() -> ssl.SSLContext:
    """One context for all downloads: loading the certificates takes tens of milliseconds."""
    return httpx.create_ssl_context()
