"""Processes of the kernels' tests: one interprets, two compile, and one compiles ahead while other tests wait."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from tests.kernels import interpreter

AHEAD = "REELRAY_COMPILES_AHEAD"
"""Environment variable of the process that compiles ahead, which shall start no other."""
WHOLE_SUITE = 1000
"""With so many tests there is waiting to be used."""

_ahead: list[subprocess.Popen[bytes]] = []


def pytest_collection_finish(session: pytest.Session) -> None:
    """A new machine compiles for minutes, and the service's tests mostly wait: beside them, at the lowest priority, the tests
    that compile run once for Triton's and inductor's caches. What they find out is found out again in their own turn."""
    mine = [item for item in session.items if "test_inductor" in item.nodeid or "compilers" in getattr(item, "fixturenames", ())]
    if len(session.items) < WHOLE_SUITE or not mine or AHEAD in os.environ or session.config.option.collectonly:
        return
    command = ["nice", "-n", "19", sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["tests/kernels", "tests/engines/backends/test_inductor.py", "-k", "fit or test_inductor"]
    quiet = subprocess.DEVNULL
    env = os.environ | {AHEAD: "1"}
    _ahead.append(subprocess.Popen(command, env=env, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True))


def pytest_sessionfinish() -> None:
    """Ends the process that compiles ahead, and those that it has started."""
    for process in _ahead:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


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
