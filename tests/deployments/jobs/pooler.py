"""Two connection poolers, in session or in transaction mode: one that treats its clients as PgBouncer does, and PgBouncer itself,
where it is installed (`apt-get install pgbouncer`)."""

import asyncio
import os
import shutil
import struct
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from deployments.hosting.embedded_postgres import _service_user
from tests.patience import PATIENCE_S

ALLOWED = {b"user", b"database", b"client_encoding"}
"""Startup parameters; PgBouncer refuses all others that it does not keep track of."""
Message = tuple[bytes, bytes]


async def receive(reader: asyncio.StreamReader) -> Message:
    head = await reader.readexactly(5)
    return head[:1], await reader.readexactly(struct.unpack("!I", head[1:])[0] - 4)


def sent(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!I", len(body) + 4) + body


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
    writer.close()


class Pooler:
    """upstream: the path of the server's socket. shared: transaction mode, with one connection for all clients."""

    def __init__(self, upstream: str, *, shared: bool):
        self.upstream = upstream
        self.shared = shared
        self.turn = asyncio.Lock()
        self.pool: tuple[asyncio.StreamReader, asyncio.StreamWriter, bytes] | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            startup = await reader.readexactly(struct.unpack("!I", await reader.readexactly(4))[0] - 4)
            if unknown := set(startup[4:].rstrip(b"\0").split(b"\0")[::2]) - ALLOWED:
                text = b"unsupported startup parameter: " + unknown.pop()
                writer.write(sent(b"E", b"SFATAL\0VFATAL\0C08P01\0M" + text + b"\0\0"))
            elif self.shared:
                self.pool = self.pool or await self.connect(startup)
                writer.write(self.pool[2])
                while True:
                    await self.transaction(reader, writer, *self.pool[:2])
            else:
                from_server, to_server, greeting = await self.connect(startup)
                writer.write(greeting)
                await asyncio.gather(copy(reader, to_server), copy(from_server, writer))
        writer.close()

    async def connect(self, startup: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, bytes]:
        """A connection to the server, and the greeting for a client, with another key to cancel by."""
        reader, writer = await asyncio.open_unix_connection(self.upstream)
        writer.write(struct.pack("!I", len(startup) + 4) + startup)
        greeting = b""
        while True:
            kind, body = await receive(reader)
            greeting += sent(kind, struct.pack("!II", 1, 1) if kind == b"K" else body)
            if kind == b"Z":
                return reader, writer, greeting

    async def transaction(
        self,
        client: asyncio.StreamReader,
        to_client: asyncio.StreamWriter,
        server: asyncio.StreamReader,
        to_server: asyncio.StreamWriter,
    ) -> None:
        """Passes messages on until the server is outside a transaction. No other client is served meanwhile."""
        kind, body = await receive(client)
        if kind == b"X":
            raise ConnectionError

        async def pass_on() -> None:
            to_server.write(sent(kind, body))
            while True:
                to_server.write(sent(*await receive(client)))

        async with self.turn:
            passing = asyncio.create_task(pass_on())
            answer: Message = (b"", b"")
            while answer != (b"Z", b"I"):
                answer = await receive(server)
                to_client.write(sent(*answer))
            passing.cancel()
            await asyncio.wait([passing])


@asynccontextmanager
async def pooling(url: str, *, shared: bool) -> AsyncIterator[str]:
    """The URL of a pooler in front of a server that listens on a socket."""
    parts = urlsplit(url)
    pooler = Pooler(parse_qs(parts.query)["host"][0] + "/.s.PGSQL.5432", shared=shared)
    with TemporaryDirectory(prefix="reelray-") as folder:
        server = await asyncio.start_unix_server(pooler.serve, f"{folder}/.s.PGSQL.5432")
        try:
            yield parts._replace(query=f"host={quote(folder)}&port=5432").geturl()
        finally:
            server.close()
            if pooler.pool is not None:
                pooler.pool[1].close()


PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


@asynccontextmanager
async def pgbouncer(url: str, *, shared: bool) -> AsyncIterator[str]:
    """The same with PgBouncer and its defaults."""
    parts = urlsplit(url)
    name, upstream = parts.path.lstrip("/"), parse_qs(parts.query)["host"][0]
    with TemporaryDirectory(prefix="reelray-") as folder:
        config = Path(folder) / "pgbouncer.ini"
        config.write_text(
            f"[databases]\n{name} = host={upstream} port=5432 dbname={name} user=postgres\n"
            f"[pgbouncer]\npool_mode = {'transaction' if shared else 'session'}\nauth_type = any\n"
            f"unix_socket_dir = {folder}\nlisten_port = 5432\n"
        )
        process = _started(config)
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not (Path(folder) / ".s.PGSQL.5432").exists():  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            yield parts._replace(query=f"host={quote(folder)}&port=5432").geturl()
        finally:
            process.kill()
            process.wait()


def _started(config: Path) -> subprocess.Popen[bytes]:
    """As the server's own user, because it refuses to be root and the server's socket is for that user alone."""
    assert PGBOUNCER is not None
    user = _service_user()
    rights: dict[str, Any] = {}
    if user is not None:
        os.chown(config.parent, user.pw_uid, user.pw_gid)
        rights = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": ()}
    return subprocess.Popen([PGBOUNCER, "-q", config], stderr=subprocess.DEVNULL, **rights)
