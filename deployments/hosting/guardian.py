"""Stops the embedded PostgreSQL of a service that was killed before it could do so.

    python -m deployments.hosting.guardian <home>

It waits in a process and session of its own for the end of the service's process, which holds the other end of its input.
"""

import fcntl
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from deployments.hosting.embedded_postgres import GUARDED, is_owner, owner_file, postgres_folder, stop_embedded
from deployments.settings import Settings

TRIES = 10


@contextmanager
def guarded(settings: Settings) -> Iterator[None]:
    """At the end of the block, or however else this process ends within it, the embedded PostgreSQL is stopped."""
    if settings.database != "embedded":
        yield
        return
    folder = postgres_folder(settings)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    name = secrets.token_hex(8)
    with owner_file(folder).open("a") as owner:
        _take(owner, name)
        command = [sys.executable, "-m", "deployments.hosting.guardian", str(settings.home), name]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True) as guardian:
            os.environ[GUARDED] = name
            try:
                yield
            finally:
                del os.environ[GUARDED]
                _name(owner, "")
                stop_embedded(settings)
                guardian.kill()


def _take(owner: IO[str], name: str) -> None:
    """Locks the file and signs it, unless another service holds it, or the guardian of a killed one, which is at its work."""
    for _ in range(TRIES):
        if _locks(owner):
            _name(owner, name)
            return
        time.sleep(0.1)  # a killed service may still be ending


def _locks(owner: IO[str]) -> bool:
    try:
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _name(owner: IO[str], name: str) -> None:
    owner.truncate(0)
    owner.write(name)
    owner.flush()


def main() -> None:
    """Waits, then stops the server, unless a new service has taken it over."""
    home, name = sys.argv[1:]
    settings = Settings(home=Path(home))
    folder = postgres_folder(settings)
    sys.stdin.buffer.read()
    with owner_file(folder).open("a") as owner:
        while not _locks(owner):  # the kernel may close a killed process's pipe before it drops its lock
            if not is_owner(folder, name):
                return
            time.sleep(0.1)
        _name(owner, "")
        stop_embedded(settings)


if __name__ == "__main__":
    main()
