"""A webhook receiver on a loopback port, and a signature check that uses only what fal's documentation tells receivers."""

import asyncio
import base64
import binascii
import hashlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from deployments.settings import Settings
from deployments.webhooks.courier import Courier
from deployments.webhooks.outbox import Outbox
from tests.patience import PATIENCE_S


@dataclass(frozen=True)
class Received:
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def request_id(self) -> str:
        return self.headers["x-fal-webhook-request-id"]


Answer = Callable[[Received, asyncio.StreamWriter], Awaitable[None]]


class Receiver:
    """answer: called with each request once it is read. peak: the most connections at once."""

    def __init__(self, answer: Answer):
        self.answer = answer
        self.port = 0
        self.received: list[Received] = []
        self.open = self.peak = 0
        self._arrived = asyncio.Event()
        self._idle = asyncio.Event()

    def url(self, path: str = "/hook", host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    async def arrival(self, count: int = 1) -> None:
        """Returns once `count` requests have arrived."""
        async with asyncio.timeout(PATIENCE_S):
            while len(self.received) < count:
                self._arrived.clear()
                await self._arrived.wait()

    async def idle(self) -> None:
        """Returns once no connection is open."""
        async with asyncio.timeout(PATIENCE_S):
            while self.open:
                self._idle.clear()
                await self._idle.wait()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self.peak = max(self.peak, self.open)
        try:
            lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines[1:] if line)
            headers = {name.lower(): value for name, value in headers.items()}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            request = Received(lines[0].split()[1], headers, body)
            self.received.append(request)
            self._arrived.set()
            with suppress(ConnectionError):
                await self.answer(request, writer)
                await writer.drain()
        finally:
            self.open -= 1
            self._idle.set()
            writer.transport.abort() if writer.transport.get_write_buffer_size() else writer.close()


def answering(*statuses: int, headers: str = "") -> Answer:
    """Answers with each status in turn, then always with the last one."""
    left = list(statuses)

    async def answer(_: Received, writer: asyncio.StreamWriter) -> None:
        status = left.pop(0) if len(left) > 1 else left[0]
        writer.write(f"HTTP/1.1 {status} As Told\r\ncontent-length: 0\r\n{headers}\r\n".encode())

    return answer


@asynccontextmanager
async def receiving(answer: Answer) -> AsyncIterator[Receiver]:
    receiver = Receiver(answer)
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        with suppress(asyncio.IncompleteReadError, asyncio.CancelledError):
            await receiver.serve(reader, writer)

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    receiver.port = listener.sockets[0].getsockname()[1]
    try:
        yield receiver
    finally:
        listener.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # the transports close in the loop's next turn


def is_signed(request: Received, jwks: dict[str, Any], now: float) -> bool:
    """The check that fal's page on webhooks describes: the time is within five minutes, and any one key fits.

    As in fal's Python sample, `x` is decoded without adding padding, and a key that cannot be read is skipped.
    """
    headers = request.headers
    if abs(now - int(headers["x-fal-webhook-timestamp"])) > 300:
        return False
    message = "\n".join(
        [
            headers["x-fal-webhook-request-id"],
            headers["x-fal-webhook-user-id"],
            headers["x-fal-webhook-timestamp"],
            hashlib.sha256(request.body).hexdigest(),
        ]
    )
    signature = bytes.fromhex(headers["x-fal-webhook-signature"])
    for key in jwks["keys"]:
        with suppress(InvalidSignature, binascii.Error):
            public = Ed25519PublicKey.from_public_bytes(base64.urlsafe_b64decode(key["x"]))
            public.verify(signature, message.encode())
            return True
    return False


def courier_of(outbox: Outbox, settings: Settings, clock: Callable[[], float] = time.time) -> Courier:
    """A courier as `deployments.app` makes one."""
    private, url = settings.fetch.allow_private, settings.public_url
    return Courier(outbox, settings.webhooks, allow_private=private, public_url=url, clock=clock)
