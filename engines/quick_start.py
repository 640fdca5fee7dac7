"""A model's process starts faster without Python's garbage collector."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collections() -> Iterator[None]:
    """For the imports of torch, diffusers and transformers, and for building nets: nearly nothing of that is garbage.

    The collector looks at everything again each time that a quarter has been added, which was a fifth of the CPU time of such a
    start (1.1 s of 5.5). Afterwards it leaves alone what is there by then.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
