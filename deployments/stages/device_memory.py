"""What follows when a device's memory was not enough for a call: only that attempt ends, and its replica proves itself before it
takes another.

The proof is a small product with a known result in memory that was just allocated. A process that fails it may have a broken
CUDA context, or a neighbour that took the memory: it refuses every call, and its health check has Serve replace it.
"""

import gc
import logging
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engines.errors import RunnerDisconnected, RunnerOutOfMemory

logger = logging.getLogger(__name__)

SIDE = 2048
"""Of the proof's matrices: three of them are 50 MB."""

_unfit = threading.Event()


@contextmanager
def proving() -> Iterator[None]:
    """For a call of a stage, on its thread. Raises `RunnerOutOfMemory` where the memory was not enough, after the proof, and
    `RunnerDisconnected` where an earlier proof failed."""
    if _unfit.is_set():
        raise RunnerDisconnected
    try:
        yield
        return
    except Exception as exc:
        if not is_out_of_memory(exc):
            raise
        logger.warning("out of memory", exc_info=exc, extra={"action": "out_of_memory"})
        traceback.clear_frames(exc.__traceback__)  # they hold the call's tensors
    # beyond the handler, where nothing refers to the failed call any more
    if not succeeds(prove):
        _unfit.set()
    raise RunnerOutOfMemory


def check() -> None:
    """A replica's health. Raises `RunnerDisconnected` after a proof that failed."""
    if _unfit.is_set():
        raise RunnerDisconnected


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device's memory, or this process's, was not enough. Torch has an error of its own for the allocator only."""
    text = f"{type(error).__name__} {error}".lower() if isinstance(error, RuntimeError) else ""
    return (
        isinstance(error, MemoryError) or "outofmemoryerror" in text or "out of memory" in text or "can't allocate memory" in text
    )


def prove() -> None:
    """Gives back what torch keeps for later calls, and computes something known. Raises whatever goes wrong with it."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is None:
        return
    on_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    if on_cuda:
        torch.cuda.empty_cache()
    ones = torch.ones(SIDE, SIDE, device="cuda" if on_cuda else "cpu")
    if not bool((ones @ ones == SIDE).all()):
        raise ArithmeticError("a product of ones is wrong")


def succeeds(proof: Callable[[], None]) -> bool:
    """Whether a proof raises nothing."""
    try:
        proof()
    except Exception:
        logger.exception("this replica takes no more calls: it failed its proof", extra={"action": "unfit"})
        return False
    return True
