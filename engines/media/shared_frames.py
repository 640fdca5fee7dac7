"""Frames in memory that a replica and its child share, so that pixels cross no socket.

There are two slots: the child fills one while the replica looks at the other. A frame's number gives its slot, so a child that a
file has taken over has no say in places and sizes. It can change pixels while they are looked at, and so give wrong pixels to
its own job. It cannot shrink the memory, which would end the replica with SIGBUS: the size is sealed (memfd_create(2)).
"""

import mmap
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

SLOTS = 2

Frames = NDArray[np.uint8]
"""(SLOTS, height, width, 3), RGB."""


@contextmanager
def new_memory(height: int, width: int) -> Iterator[int]:
    """The descriptor of memory for frames of this size in pixels. Whoever has mapped it needs the descriptor no longer."""
    size = SLOTS * height * width * 3
    if sys.platform == "linux":
        import fcntl

        descriptor = os.memfd_create("frames", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    else:  # such a system keeps a child from nothing: see `confinement.py`
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    try:
        os.ftruncate(descriptor, size)
        if sys.platform == "linux":
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        yield descriptor
    finally:
        os.close(descriptor)


def mapped(descriptor: int, height: int, width: int, writable: bool) -> Frames:
    """The memory of `new_memory`, for as long as the array or a view of it exists. Raises `MemoryError`."""
    size, access = SLOTS * height * width * 3, mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
    try:
        memory = mmap.mmap(descriptor, size, access=access)
    except OSError as exc:
        raise MemoryError from exc
    return np.frombuffer(memory, np.uint8).reshape(SLOTS, height, width, 3)
