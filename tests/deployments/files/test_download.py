import asyncio
import base64
import gzip
import ipaddress
import socket
import ssl
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from deployments.files import download as download_module
from deployments.files.download import Refused, decoded_data_uri, download, download_all, download_folder, is_public
from deployments.settings import FetchSettings
from engines.errors import FileDownloadError, FileTooLarge, StorageFailed
from tests.patience import PATIENCE_S

OPEN = FetchSettings(allow_private=True, max_bytes=1000, timeout_s=60)
CLOSED = FetchSettings(max_bytes=1000, timeout_s=60)


def http(status: str, body: bytes = b"", **headers: str) -> bytes:
    fields = {"content-length": str(len(body)), **{key.replace("_", "-"): value for key, value in headers.items()}}
    head = "".join(f"{key}: {value}\r\n" for key, value in fields.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body


class Server:
    """Answers each path with fixed bytes, and records the requests' heads."""

    def __init__(self, port: int, answers: dict[str, bytes]):
        self.port, self.answers, self.heads = port, answers, list[str]()

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"


@asynccontextmanager
async def serving(answers: dict[str, bytes], tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        server.heads.append(head)
        path = head.split()[1]
        writer.write(server.answers[path])
        open_writers.append(writer)
        if path != "/hangs":
            writer.close()

    open_writers: list[asyncio.StreamWriter] = []
    listener = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=tls)
    server = Server(listener.sockets[0].getsockname()[1], answers)
    try:
        yield server
    finally:
        listener.close()
        for writer in open_writers:
            writer.transport.abort()
        await asyncio.sleep(0)  # the transports close in the loop's next turn


def resolving_to(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> list[str]:
    """Makes every host name resolve to these addresses. Returns the names that are looked up."""
    asked: list[str] = []

    def getaddrinfo(host: str, port: int, **kwargs: object) -> list[tuple[object, ...]]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


async def fetched(url: str, settings: FetchSettings) -> bytes:
    """The bytes that `fetch` wrote. Checks that a failed download leaves no file."""
    with download_folder() as folder:
        file = folder / "image"
        try:
            await download(url, settings, "image_url", file)
        except BaseException:
            assert listing(folder) == []
            raise
        return read(file)


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def read(file: Path) -> bytes:
    return file.read_bytes()


async def refusal(url: str, settings: FetchSettings) -> str:
    with pytest.raises(FileDownloadError) as caught:
        await fetched(url, settings)
    assert caught.value.loc == ("body", "image_url")
    assert "127.0.0.1" not in caught.value.message
    return caught.value.message


# Data URIs


@pytest.mark.parametrize(
    "payload",
    ["aGVsbG8/Pg==", "aGVsbG8/Pg", "aGVs\nbG8/\r\n Pg==", "aGVsbG8%2FPg%3D%3D"],
    ids=["strict", "no padding", "wrapped", "percent-encoded"],
)
async def test_data_uri_is_decoded_as_browsers_do(payload: str) -> None:
    assert await fetched(f"data:image/png;base64,{payload}", CLOSED) == b"hello?>"


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 100])
def test_data_uri_is_the_same_in_pieces_of_any_size(size: int) -> None:
    uri = b"data:;base64," + quote(base64.encodebytes(bytes(range(251, 256)) * 40).decode()).encode()
    pieces = [uri[:13], *(uri[at : at + size] for at in range(13, len(uri), size))]
    assert decoded_data_uri(pieces, 200) == bytes(range(251, 256)) * 40
    with pytest.raises(Refused):
        decoded_data_uri([b"data:;base64,aGk=", b"aGk="], 200)


@pytest.mark.parametrize("head", ["data:;base64", "DATA:image/png;BASE64", "data:text/plain;charset=utf-8;base64"])
async def test_data_uri_type_does_not_matter(head: str) -> None:
    assert await fetched(f"{head},aGk=", CLOSED) == b"hi"


@pytest.mark.parametrize(
    "uri", ["data:", "data:image/png;base64", "data:text/plain,hi", "data:;base64,a*b=", "data:;base64,aGkaa", "data:;base64,é"]
)
async def test_broken_data_uri_is_refused(uri: str) -> None:
    assert "data URI" in await refusal(uri, CLOSED)


async def test_data_uri_may_be_as_large_as_allowed_and_no_larger() -> None:
    def uri(size: int) -> str:
        return "data:;base64," + base64.b64encode(bytes(size)).decode()

    assert len(await fetched(uri(1000), CLOSED)) == 1000
    with pytest.raises(FileTooLarge) as caught:
        await fetched(uri(1001), CLOSED)
    assert caught.value.ctx == {"max_size": 1000}
    assert caught.value.loc == ("body", "image_url")


# Where a URL may lead


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("fe80::1", False),
        ("fc00::1", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::808:808", True),
        ("2002:7f00:1::", False),
        ("2001:db8::1", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) is public


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "127.1", "0x7f000001", "2130706433", "[::1]", "[::ffff:127.0.0.1]", "0"]
)
async def test_every_spelling_of_this_machine_is_refused(host: str) -> None:
    async with serving({"/": http("200 OK", b"secret")}) as server:
        assert "public address" in await refusal(server.url("/", host), CLOSED)
        assert server.heads == []


async def test_one_private_address_among_public_ones_is_enough_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    resolving_to(monkeypatch, "8.8.8.8", "10.0.0.1")
    assert "public address" in await refusal("http://cdn.example/x", CLOSED)


async def test_unknown_and_private_hosts_are_told_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    resolving_to(monkeypatch, "10.0.0.1")
    private = await refusal("http://db.internal/", CLOSED)

    def unknown(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert await refusal("http://nothing.internal/", CLOSED) == private


async def test_redirect_to_a_private_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving({"/": b"", "/secret": http("200 OK", b"secret")}) as server:
        server.answers["/"] = http("302 Found", location=f"http://127.0.0.1:{server.port}/secret")
        monkeypatch.setattr(download_module, "is_public", lambda address: len(server.heads) == 0)  # the first hop passes
        assert "public address" in await refusal(server.url("/"), CLOSED)
        assert len(server.heads) == 1


async def test_connects_to_the_address_that_was_checked_under_the_name_that_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving({"/a?b=c%20d": http("200 OK", b"hello")}) as server:
        asked = resolving_to(monkeypatch, "127.0.0.1")
        url = f"http://cdn.example:{server.port}/a?b=c%20d"
        assert await fetched(url, OPEN) == b"hello"
        assert f"host: cdn.example:{server.port}\r\n" in server.heads[0].lower()
    assert asked == ["cdn.example"]  # one lookup only: a second one could return another, unchecked address


async def test_second_address_is_tried_when_the_first_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving({"/": http("200 OK", b"hello")}) as server:

        async def two(host: str, port: int, allow_private: bool) -> list[download_module.IPAddress]:
            return [ipaddress.ip_address("127.0.0.2"), ipaddress.ip_address("127.0.0.1")]

        monkeypatch.setattr(download_module, "_resolve", two)
        assert await fetched(server.url("/"), OPEN) == b"hello"


async def test_environment_proxy_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    async with serving({"/": http("200 OK", b"hello")}) as server:
        assert await fetched(server.url("/"), OPEN) == b"hello"


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.com/x",
        "file:///etc/passwd",
        "http://",
        "http:///x",
        "http://[::1",
        "http://a b/",
        "http://xn--a/",
        "http://127.0.0.1:99999/",
    ],
)
async def test_other_urls_are_refused(url: str) -> None:
    await refusal(url, OPEN)


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate, with its key, for cdn.example."""
    path = tmp_path_factory.mktemp("tls") / "cdn.pem"
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "cdn.example")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(days=2))
    names = x509.SubjectAlternativeName([x509.DNSName("cdn.example")])
    signed = builder.add_extension(names, critical=False).sign(key, hashes.SHA256())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(private + signed.public_bytes(Encoding.PEM))
    return path


@pytest.mark.parametrize(("host", "trusted"), [("cdn.example", True), ("other.example", False)])
async def test_certificate_is_checked_against_the_name(
    host: str, trusted: bool, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate)
    monkeypatch.setattr(download_module, "_tls", lambda: ssl.create_default_context(cafile=str(certificate)))
    async with serving({"/": http("200 OK", b"hello")}, tls) as server:
        resolving_to(monkeypatch, "127.0.0.1")
        url = f"https://{host}:{server.port}/"
        if trusted:
            assert await fetched(url, OPEN) == b"hello"
        else:
            assert "connection failed" in await refusal(url, OPEN)


# Redirects, status, size, time


async def test_relative_redirects_are_followed() -> None:
    async with serving({"/a": http("301 Moved", location="b?x=1"), "/b?x=1": http("200 OK", b"hello")}) as server:
        assert await fetched(server.url("/a"), OPEN) == b"hello"


async def test_endless_redirects_end() -> None:
    async with serving({"/": http("302 Found", location="/")}) as server:
        assert "more than 5 redirects" in await refusal(server.url("/"), OPEN)
        assert len(server.heads) == 6


async def test_redirect_out_of_http_is_refused() -> None:
    async with serving({"/": http("302 Found", location="file:///etc/passwd")}) as server:
        assert "only http" in await refusal(server.url("/"), OPEN)


@pytest.mark.parametrize("status", ["404 Not Found", "403 Forbidden", "500 Oops", "204 No Content", "206 Partial"])
async def test_status_is_named(status: str) -> None:
    async with serving({"/": http(status)}) as server:
        assert f"status {status[:3]}" in await refusal(server.url("/"), OPEN)


async def test_a_large_file_is_refused_before_it_is_read() -> None:
    async with serving({"/": http("200 OK", content_length="1001")}) as server:
        with pytest.raises(FileTooLarge) as caught:
            await fetched(server.url("/"), OPEN)
    assert caught.value.ctx == {"max_size": 1000}


async def test_a_large_file_that_hides_its_size_is_cut_off() -> None:
    chunk = b"400\r\n" + bytes(0x400) + b"\r\n"
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    async with serving({"/hangs": head + chunk}) as server:  # the answer never ends
        with pytest.raises(FileTooLarge):
            await fetched(server.url("/hangs"), OPEN)


async def test_size_counts_after_decoding() -> None:
    bomb, small = gzip.compress(bytes(100_000)), gzip.compress(b"hello")
    async with serving(
        {"/bomb": http("200 OK", bomb, content_encoding="gzip"), "/small": http("200 OK", small, content_encoding="gzip")}
    ) as server:
        assert len(bomb) < 1000
        with pytest.raises(FileTooLarge):
            await fetched(server.url("/bomb"), OPEN)
        assert await fetched(server.url("/small"), OPEN) == b"hello"


@pytest.mark.parametrize("name", ["aws-chunked", "UTF-8", "none", "", "identity", "aws-chunked,", "binary, utf-8"])
async def test_an_encoding_that_is_no_coding_of_the_bytes_is_ignored(name: str) -> None:
    async with serving({"/": http("200 OK", b"hello", content_encoding=name)}) as server:
        assert await fetched(server.url("/"), OPEN) == b"hello"


@pytest.mark.parametrize("name", ["gzip", "GZIP", "x-gzip", "aws-chunked,gzip", "gzip, UTF-8"])
async def test_a_coding_is_decoded_whatever_stands_beside_it(name: str) -> None:
    async with serving({"/": http("200 OK", gzip.compress(b"hello"), content_encoding=name)}) as server:
        assert await fetched(server.url("/"), OPEN) == b"hello"


@pytest.mark.parametrize("name", ["br", "zstd", "compress", "aws-chunked, br"])
async def test_a_coding_without_a_bound_is_refused_by_name(name: str) -> None:
    async with serving({"/": http("200 OK", b"hello", content_encoding=name)}) as server:
        assert f"its content encoding, {name.split(', ')[-1]}, is not supported" in await refusal(server.url("/"), OPEN)


async def test_stacked_encodings_are_refused() -> None:
    twice = gzip.compress(gzip.compress(bytes(100_000)))
    async with serving({"/": http("200 OK", twice, content_encoding="gzip, gzip")}) as server:
        assert "encoding" in await refusal(server.url("/"), OPEN)


async def test_a_slow_server_runs_out_of_time() -> None:
    async with serving({"/hangs": b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhe"}) as server:
        message = await refusal(server.url("/hangs"), OPEN.model_copy(update={"timeout_s": 0.2}))
    assert "longer than 0.2 s" in message


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhe"])
async def test_a_broken_answer_is_a_download_error(answer: bytes) -> None:
    async with serving({"/": answer}) as server:
        assert "connection failed" in await refusal(server.url("/"), OPEN)


async def test_nobody_listening_is_a_download_error() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    assert "connection failed" in await refusal(f"http://127.0.0.1:{port}/", OPEN)


# Files


async def test_a_download_goes_to_its_file_as_it_comes(tmp_path: Path) -> None:
    async with serving({"/hangs": b"HTTP/1.1 200 OK\r\ncontent-length: 900000\r\n\r\n" + bytes(600_000)}) as server:
        settings = OPEN.model_copy(update={"max_bytes": 900_000})
        running = asyncio.create_task(download(server.url("/hangs"), settings, "video_url", tmp_path / "video"))
        await asyncio.to_thread(wait_for_size, tmp_path / "video", 500_000)  # the rest may wait in the file's buffer
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert listing(tmp_path) == [], "a cancelled download leaves nothing"


def wait_for_size(file: Path, size: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not file.exists() or file.stat().st_size < size:
        assert time.monotonic() < deadline
        time.sleep(0.01)


async def test_files_are_fetched_at_once_and_known_by_their_fields(tmp_path: Path) -> None:
    async with serving({"/a": http("200 OK", b"hello")}) as server:
        urls = {"image_url": server.url("/a"), "mask_url": "data:;base64,aGk="}
        files = await download_all(urls, OPEN, tmp_path)
        assert await download_all({}, OPEN, tmp_path) == {}
    assert {field: read(file) for field, file in files.items()} == {"image_url": b"hello", "mask_url": b"hi"}


async def test_one_bad_file_ends_the_other_downloads(tmp_path: Path) -> None:
    async with serving({"/hangs": http("200 OK", content_length="9"), "/none": http("404 Not Found")}) as server:
        with pytest.raises(FileDownloadError) as caught:
            await download_all({"a_url": server.url("/hangs"), "b_url": server.url("/none")}, OPEN, tmp_path)
    assert caught.value.loc == ("body", "b_url")
    assert listing(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full: not verified that a full disk counts as our fault")
@pytest.mark.parametrize("length", [5, 50_000])  # the write fails when the file is closed, or earlier
async def test_a_full_disk_is_not_the_callers_fault(length: int, tmp_path: Path) -> None:
    settings = OPEN.model_copy(update={"max_bytes": 100_000})
    async with serving({"/": http("200 OK", bytes(length))}) as server:
        for url in (server.url("/"), "data:;base64," + base64.b64encode(bytes(length)).decode()):
            (tmp_path / "video").symlink_to("/dev/full")
            with pytest.raises(StorageFailed) as caught:
                await download(url, settings, "video_url", tmp_path / "video")
            assert caught.value.retryable
            assert listing(tmp_path) == []


def test_no_room_for_the_folder_is_not_the_callers_fault_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with pytest.raises(StorageFailed), download_folder():
        pass
