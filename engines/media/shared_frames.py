"""Frames in memory that a replica and its child share, so that pixels cross no socket.

There are two slots: the child fills one while the replica looks at the other. A frame's number gives its slot, so a child that a
file has taken over has no say in places and sizes. It can change pixels while they are looked at, and so give wrong pixels to
its own job. It cannot shrink the memory, which would end the replica with SIGBUS: the size is sealed (memfd_create(2)).
"""

import fcntl
import mmap
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

SLOTS = 2
KEPT_BYTES = 16 << 20
"""Memory of this size serves video after video, up to 1080p: new memory costs 12 ms for two such frames, kept memory nothing.
A video with larger frames has memory of its own."""


class Memory:
    """For `SLOTS` frames of some size, mapped into this process until neither it nor an array of it exists any more."""

    def __init__(self, descriptor: int, size: int, writable: bool):
        """descriptor: of so many bytes; it is not needed afterwards. Raises `MemoryError`."""
        self.size = size
        try:
            self._mapped = mmap.mmap(descriptor, size, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
        except OSError as exc:
            raise MemoryError from exc

    def slots(self, height: int, width: int) -> NDArray[np.uint8]:
        """(SLOTS, height, width, 3): room for frames of this size in pixels."""
        used = size_for(height, width)
        return np.frombuffer(self._mapped, np.uint8, used).reshape(SLOTS, height, width, 3)


def size_for(height: int, width: int) -> int:
    """Bytes of memory for frames of this size in pixels."""
    return SLOTS * height * width * 3


@contextmanager
def sealed(size: int) -> Iterator[int]:
    """The descriptor of new memory of so many bytes, zero until written."""
    if sys.platform == "linux":
        descriptor = os.memfd_create("frames", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    else:  # it keeps a child from nothing: see `confinement.py`
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    try:
        os.ftruncate(descriptor, size)
        if sys.platform == "linux":
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        yield descriptor
    finally:
        os.close(descriptor)
