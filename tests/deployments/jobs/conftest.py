"""The store's suite runs twice: on the embedded server, and on one that an operator gives by URL.

The second is `REELRAY_TEST_DATABASE`, whose user may create databases. Where that is not set it is the oldest PostgreSQL on this
machine that we support, started on loopback in a temporary place and asking for a password, as an operator's would.
"""

import os
import pwd
import re
import secrets
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import asyncpg
import pytest

from deployments.hosting.embedded_postgres import SERVICE_USER
from deployments.jobs.database import OLDEST_SERVER
from tests.conftest import template


@pytest.fixture
async def sql(database: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection past the store, to look behind it and to move rows in time."""
    connection = await asyncpg.connect(database)
    yield connection
    await connection.close()


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The first submission's answer gets lost on its way, its row being there; the statement stands here then."""
    fetchmany, statements = asyncpg.Connection.fetchmany, list[str]()

    async def fetch_and_lose(self: asyncpg.Connection, query: str, *args: object) -> object:
        rows = await fetchmany(self, query, *args)
        if "INSERT INTO jobs" in query and not statements:
            statements.append(query)
            raise asyncpg.ConnectionDoesNotExistError
        return rows

    monkeypatch.setattr(asyncpg.Connection, "fetchmany", fetch_and_lose)
    return statements


@pytest.fixture(scope="session", params=["embedded", "by-url"])
def postgres(request: pytest.FixtureRequest, embedded_server: str) -> Iterator[str]:
    """The server's URL: every test that asks, itself or through `database` or `store`, runs on both."""
    if request.param == "embedded":
        yield embedded_server
    elif url := os.environ.get("REELRAY_TEST_DATABASE"):
        with template(url):
            yield url
    elif programs := oldest_programs():
        with own_server(programs) as url, template(url):
            yield url
    else:
        pytest.skip(
            f"not verified on a server given by URL: no REELRAY_TEST_DATABASE, and no PostgreSQL {OLDEST_SERVER} or newer here"
        )


def oldest_programs() -> Path | None:
    """The folder with the programs of the oldest PostgreSQL here that is supported: Debian's places, and the PATH."""
    found = {}
    for initdb in [*Path("/usr/lib/postgresql").glob("*/bin/initdb"), *filter(None, [shutil.which("initdb")])]:
        said = subprocess.run([initdb, "--version"], capture_output=True, text=True, check=True).stdout
        if version := re.search(r"\) (\d+)", said):
            found[int(version[1])] = Path(initdb).resolve().parent
    return min(((version, place) for version, place in found.items() if version >= OLDEST_SERVER), default=(0, None))[1]


@contextmanager
def own_server(programs: Path) -> Iterator[str]:
    """A server of the machine's own PostgreSQL; its URL. Root, whom PostgreSQL refuses, runs it as the embedded one's user."""
    user = pwd.getpwnam(SERVICE_USER).pw_uid if os.geteuid() == 0 else None
    password = secrets.token_hex(16)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with TemporaryDirectory(prefix="reelray-") as place:

        def run(program: str, *args: str) -> None:
            subprocess.run(
                [programs / program, *args],
                cwd=place,
                env={**os.environ, "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # not a pipe, which the server would keep open
                check=True,
                user=user,
            )

        Path(place, "password").write_text(password)
        if user is not None:
            os.chown(place, user, -1)
            os.chown(Path(place, "password"), user, -1)
        run("initdb", "-D", "data", "-U", "reelray", "-E", "UTF8", "--auth=scram-sha-256", "--pwfile=password", "--no-sync")
        options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories= -c max_connections=200"
        options += " -c fsync=off -c full_page_writes=off"  # only a crash of the machine could lose anything
        run("pg_ctl", "-D", "data", "-l", "server.log", "-w", "-o", options, "start")
        try:
            yield f"postgresql://reelray:{password}@127.0.0.1:{port}/postgres"
        finally:
            run("pg_ctl", "-D", "data", "-m", "fast", "-w", "stop")
