"""A TCP proxy that loses the service's first answer to every submission under an idempotency key."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

CHUNK = 65_536
KEY = re.compile(rb"idempotency-key: ([^\r\n]+)", re.IGNORECASE)


class Cutting:
    """cut: the keys whose first answer was lost. Every other answer is cut in its middle, the rest before the first byte."""

    def __init__(self, port: int):
        self._port = port
        self.cut: set[bytes] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves one client connection. Neither client sends a request before the last one is answered."""
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self._port)
        request = bytearray()

        async def ask() -> None:
            while data := await reader.read(CHUNK):
                request.extend(data)
                upstream_writer.write(data)

        async def answer() -> None:
            while data := await upstream_reader.read(CHUNK):
                keys = {bytes(key) for key in KEY.findall(request)}
                request.clear()
                if keys - self.cut:
                    self.cut |= keys
                    if len(self.cut) % 2:
                        writer.write(data[: len(data) // 2])
                        await writer.drain()
                    return
                writer.write(data)

        directions = [asyncio.create_task(ask()), asyncio.create_task(answer())]
        try:
            await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for direction in directions:
                direction.cancel()
            await asyncio.wait(directions)
            for side in (writer, upstream_writer):
                side.close()


@asynccontextmanager
async def cutting(base_url: str) -> AsyncIterator[tuple[str, Cutting]]:
    """Starts a proxy in front of a service. Yields the proxy's base URL, and the proxy."""
    proxy = Cutting(int(base_url.rpartition(":")[2]))
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", proxy
    finally:
        server.close()
