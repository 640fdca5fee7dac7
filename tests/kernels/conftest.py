"""The process in which the kernels' tests interpret them."""

from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from tests.kernels import interpreter


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Executor]:
    """Runs functions in a separate process, where kernels are interpreted; in this process they are compiled."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=interpreter.start) as executor:
        yield executor
