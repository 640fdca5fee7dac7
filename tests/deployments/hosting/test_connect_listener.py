import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from deployments.hosting import connect_listener
from tests.patience import PATIENCE_S


@asynccontextmanager
async def proxied() -> AsyncIterator[int]:
    """The port of a listener in front of a service that answers each line in capitals, and says goodbye at the end."""

    async def shout(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async for line in reader:
            writer.write(line.upper())
        writer.write(b"GOODBYE")
        writer.close()

    service = await asyncio.start_server(shout, "127.0.0.1", 0)
    listener = await connect_listener.listen("127.0.0.1", 0, "127.0.0.1", service.sockets[0].getsockname()[1])
    async with service, listener:
        yield listener.sockets[0].getsockname()[1]


async def answer_to(port: int, head: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head)
    async with asyncio.timeout(PATIENCE_S):
        line = await reader.readline()
    writer.close()
    return line.strip()


@pytest.mark.parametrize(
    "host", ["fal.run", "queue.fal.run", "rest.fal.ai", "rest.alpha.fal.ai", "v3.fal.media", "Queue.Fal.Run"]
)
async def test_fals_hosts_lead_to_the_service_both_ways_to_the_end(host: str) -> None:
    async with proxied() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"CONNECT {host}:443 HTTP/1.1\r\nhost: {host}:443\r\n\r\nhello\n".encode())
        async with asyncio.timeout(PATIENCE_S):
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 200 Connection established\r\n\r\n"
            assert await reader.readline() == b"HELLO\n"
            writer.write(b"again\n")
            writer.write_eof()
            assert await reader.read() == b"AGAIN\nGOODBYE"
        writer.close()


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"CONNECT example.com:443 HTTP/1.1\r\n\r\n", b"403"),
        (b"CONNECT fal.run:80 HTTP/1.1\r\n\r\n", b"403"),
        (b"CONNECT fal.run.evil.example:443 HTTP/1.1\r\n\r\n", b"403"),
        (b"CONNECT fal.run HTTP/1.1\r\n\r\n", b"403"),
        (b"CONNECT 127.0.0.1:443 HTTP/1.1\r\n\r\n", b"403"),
        (b"CONNECT  HTTP/1.1\r\n\r\n", b"403"),
        (b"GET http://fal.run/ HTTP/1.1\r\n\r\n", b"405"),
        (b"\r\n\r\n", b"405"),
        (b"x" * 20_000, b"400"),
    ],
)
async def test_everything_else_is_refused(head: bytes, status: bytes) -> None:
    async with proxied() as port:
        assert (await answer_to(port, head)).split()[1] == status


async def test_a_caller_that_says_nothing_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect_listener, "HEAD_S", 0.05)
    async with proxied() as port:
        assert (await answer_to(port, b"CONNECT fal.run")).split()[1] == b"400"


async def test_a_service_that_is_down_is_a_502() -> None:
    listener = await connect_listener.listen("127.0.0.1", 0, "127.0.0.1", 1)
    async with listener:
        port = listener.sockets[0].getsockname()[1]
        assert (await answer_to(port, b"CONNECT fal.run:443 HTTP/1.1\r\n\r\n")).split()[1] == b"502"
