"""Triton kernels run on the CPU, in a process of their own: `TRITON_INTERPRET=1` has to be set before any kernel is imported,
and would be in the way of whoever compiles kernels in this one.
"""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from typing import TypeVar

Result = TypeVar("Result")


def interpreted(function: Callable[..., Result], *args: object) -> Result:
    """function(*args) in the interpreting process, which is started once. All of it must survive pickling."""
    return _worker().submit(function, *args).result()


@cache
def _worker() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"), initializer=_interpret)


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
