"""Temporary folders that a killed process does not leave behind for good: the next process to start deletes them.

A living process holds a lock on each of its folders, and the kernel drops the lock when its holder dies, however it does.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "reelray-work-"


@contextmanager
def temporary_folder(place: str | None = None) -> Iterator[Path]:
    """A folder in `place`, by default `TMPDIR`, deleted at the end with everything in it. Raises `OSError`."""
    folder = tempfile.TemporaryDirectory(prefix=PREFIX, dir=place)
    lock = os.open(folder.name, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with folder:
            yield Path(folder.name)
    finally:
        os.close(lock)


def delete_left_folders(place: str | None = None) -> None:
    """Deletes the folders in `place` whose processes are dead. Empty ones stay: they may just be made, and not locked yet."""
    for folder in Path(place or tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # it is locked, another user's, or just being deleted
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.listdir(lock):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder)
            finally:
                os.close(lock)
