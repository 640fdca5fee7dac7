"""A small HTTP proxy that knows one method, CONNECT, and one target: it leads fal's hosts to our own TLS port.

With it as `HTTPS_PROXY` fal's Python client reaches us under all of fal's names, uploads and tokens included. It decrypts
nothing: the bytes go through as they are, and our certificate has those names. fal-queue-protocol.md, recipe P2.
"""

import asyncio
import logging
from contextlib import suppress

from deployments.ingress.target_routing import PREFIXES

logger = logging.getLogger(__name__)

HEAD_S = 10.0
CONNECT_S = 10.0
MAX_HEAD_BYTES = 16_384
MAX_CONNECTIONS = 1000
CHUNK_BYTES = 65_536
TARGETS = frozenset(f"{host}:443" for host in PREFIXES)

_ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"


class ConnectListener:
    """Splices connections to fal's hosts to `host`:`port`, and refuses all others. open: how many connections it has now."""

    def __init__(self, host: str, port: int):
        self._host, self._port = host, port
        self.open = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves one client connection."""
        self.open += 1
        try:
            refusal = await self._refusal(reader)
            if refusal is None:
                await self._splice(reader, writer)
            else:
                writer.write(_answer(refusal))
                await writer.drain()
        except OSError:  # either side has gone
            pass
        finally:
            self.open -= 1
            writer.close()

    async def _refusal(self, reader: asyncio.StreamReader) -> str | None:
        """The status line of a request that is refused."""
        if self.open > MAX_CONNECTIONS:
            return "503 Too many connections"
        try:
            async with asyncio.timeout(HEAD_S):
                head = await reader.readuntil(b"\r\n\r\n")
        except (TimeoutError, asyncio.LimitOverrunError, asyncio.IncompleteReadError):
            return "400 Bad request"
        method, _, rest = head.decode("latin-1").partition(" ")
        target = rest.partition(" ")[0].lower()
        if method != "CONNECT":
            return "405 Only CONNECT is served"
        return None if target in TARGETS else "403 Only fal's hosts are served, at port 443"

    async def _splice(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(CONNECT_S):
                from_us, to_us = await asyncio.open_connection(self._host, self._port)
        except (OSError, TimeoutError):
            logger.warning("the service cannot be reached", extra={"action": "connect_failed"})
            writer.write(_answer("502 The service cannot be reached"))
            await writer.drain()
            return
        try:
            writer.write(_ESTABLISHED)
            async with asyncio.TaskGroup() as group:
                group.create_task(_pump(reader, to_us))
                group.create_task(_pump(from_us, writer))
        except* OSError:
            pass
        finally:
            to_us.close()


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    """Copies until the source ends, then ends the sink's direction: the other one may still have something to say."""
    while data := await source.read(CHUNK_BYTES):
        sink.write(data)
        await sink.drain()
    with suppress(OSError):
        sink.write_eof()


def _answer(status: str) -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".encode()


async def listen(host: str, port: int, to_host: str, to_port: int) -> asyncio.Server:
    """A listener that is up. Raises `OSError` if it cannot listen there."""
    return await asyncio.start_server(ConnectListener(to_host, to_port).serve, host, port, limit=MAX_HEAD_BYTES)
