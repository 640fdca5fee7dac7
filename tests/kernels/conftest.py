"""Processes of the kernels' tests: one interprets, two compile."""

from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from tests.kernels import interpreter


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Executor]:
    """Runs functions in a process of its own, where kernels are interpreted: this one compiles them."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=interpreter.start) as executor:
        yield executor


@pytest.fixture(scope="session")
def compilers() -> Iterator[Executor]:
    """Two processes, because a kernel takes a second or two."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as executor:
        yield executor
