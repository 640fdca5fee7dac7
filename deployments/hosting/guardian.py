"""Stops the embedded PostgreSQL of a service that was killed before it could do so.

    python -m deployments.hosting.guardian <home>

It waits in a process and session of its own for the end of the service's process, which holds the other end of its input.
"""

import fcntl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deployments.hosting.embedded_postgres import postgres_folder, stop_embedded
from deployments.settings import Settings


@contextmanager
def guarded(settings: Settings) -> Iterator[None]:
    """If this process ends within the block, however it does, the embedded PostgreSQL is stopped."""
    if settings.database != "embedded":
        yield
        return
    with _owner_file(settings).open("w") as owner:
        with suppress(BlockingIOError):  # the guardian of a killed service has it, and still stops that one's server
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        command = [sys.executable, "-m", "deployments.hosting.guardian", str(settings.home)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True) as guardian:
            try:
                yield
            finally:
                guardian.kill()


def _owner_file(settings: Settings) -> Path:
    """Locked by the service that the server belongs to."""
    folder = postgres_folder(settings)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder / "owner"


def main() -> None:
    """Waits, then stops the server, unless a new service has taken it over."""
    settings = Settings(home=Path(sys.argv[1]))
    sys.stdin.buffer.read()
    with _owner_file(settings).open("w") as owner, suppress(BlockingIOError):
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        stop_embedded(settings)


if __name__ == "__main__":
    main()
