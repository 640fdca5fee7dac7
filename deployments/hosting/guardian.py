"""Stops the embedded PostgreSQL of a service that was killed before it could do so.

    python -m deployments.hosting.guardian <home>

It waits in a process and session of its own for the end of the service's process, which holds the other end of its input.
"""

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from deployments.hosting.embedded_postgres import GUARDED, owner_file, postgres_folder, stop_embedded
from deployments.settings import Settings

TRIES = 10


@contextmanager
def guarded(settings: Settings) -> Iterator[None]:
    """If this process ends within the block, however it does, the embedded PostgreSQL is stopped."""
    if settings.database != "embedded":
        yield
        return
    folder = postgres_folder(settings)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with owner_file(folder).open("a") as owner:
        _take(owner)
        command = [sys.executable, "-m", "deployments.hosting.guardian", str(settings.home)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True) as guardian:
            os.environ[GUARDED] = "1"
            try:
                yield
            finally:
                del os.environ[GUARDED]
                guardian.kill()


def _take(owner: IO[str]) -> None:
    """Locks the file, unless another service or the guardian of a killed one, which still stops that one's server, holds it."""
    for _ in range(TRIES):
        with suppress(BlockingIOError):
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.1)  # an orphan may be looking whether anybody holds it


def main() -> None:
    """Waits, then stops the server, unless a new service has taken it over."""
    settings = Settings(home=Path(sys.argv[1]))
    sys.stdin.buffer.read()
    with owner_file(postgres_folder(settings)).open("a") as owner, suppress(BlockingIOError):
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        stop_embedded(settings)


if __name__ == "__main__":
    main()
