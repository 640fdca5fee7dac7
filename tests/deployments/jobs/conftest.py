"""The store's tests run twice: on the embedded server, and on one that an operator gives by URL.

The second one's URL is `REELRAY_TEST_DATABASE`; its user must be allowed to create databases. If that is not set, the oldest
supported PostgreSQL on this machine is started on loopback in a temporary folder, with a password as an operator's would have.
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
    """A direct connection to the database, to inspect rows and to shift their times."""
    connection = await asyncpg.connect(database)
    yield connection
    await connection.close()


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The first submission is committed, but its answer is lost. The list then holds its SQL statement."""
    return lose_first_answer(monkeypatch, "fetchmany", "INSERT INTO jobs")


def lose_first_answer(monkeypatch: pytest.MonkeyPatch, method: str, word: str) -> list[str]:
    """Loses the answer to the first statement with `word`. The list then holds it. method: of asyncpg's connections."""
    call, statements = getattr(asyncpg.Connection, method), list[str]()

    async def call_and_lose(self: asyncpg.Connection, query: str, *args: object) -> object:
        rows = await call(self, query, *args)
        if word in query and not statements:
            statements.append(query)
            raise asyncpg.ConnectionDoesNotExistError
        return rows

    monkeypatch.setattr(asyncpg.Connection, method, call_and_lose)
    return statements


@pytest.fixture(scope="session", params=["embedded", "by-url"])
def postgres(request: pytest.FixtureRequest, embedded_server: str) -> Iterator[str]:
    """The server's URL. A test that uses it, directly or through `database` or `store`, runs on both servers."""
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
    """The program folder of the oldest supported PostgreSQL here; looks in Debian's folders and on the PATH."""
    found = {}
    on_path = shutil.which("initdb")
    for initdb in [*Path("/usr/lib/postgresql").glob("*/bin/initdb"), *([Path(on_path)] if on_path else [])]:
        said = subprocess.run([initdb, "--version"], capture_output=True, text=True, check=True).stdout
        if version := re.search(r"\) (\d+)", said):
            found[int(version[1])] = initdb.resolve().parent
    return min(((version, place) for version, place in found.items() if version >= OLDEST_SERVER), default=(0, None))[1]


@contextmanager
def own_server(programs: Path) -> Iterator[str]:
    """Runs the machine's own PostgreSQL; gives its URL. PostgreSQL refuses root, so root runs it as `SERVICE_USER`."""
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
                stdout=subprocess.DEVNULL,  # not a pipe: the server would keep it open
                check=True,
                user=user,
            )

        Path(place, "password").write_text(password)
        if user is not None:
            os.chown(place, user, -1)
            os.chown(Path(place, "password"), user, -1)
        run("initdb", "-D", "data", "-U", "reelray", "-E", "UTF8", "--auth=scram-sha-256", "--pwfile=password", "--no-sync")
        options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories= -c max_connections=200"
        options += " -c fsync=off -c full_page_writes=off"  # only a crash of the machine could lose data
        run("pg_ctl", "-D", "data", "-l", "server.log", "-w", "-o", options, "start")
        try:
            yield f"postgresql://reelray:{password}@127.0.0.1:{port}/postgres"
        finally:
            run("pg_ctl", "-D", "data", "-m", "fast", "-w", "stop")
