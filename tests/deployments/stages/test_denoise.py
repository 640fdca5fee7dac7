"""What a denoise replica keeps of its jobs, what it reports, and how it stops."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from deployments.stages import denoise
from deployments.stages.denoise import MOST_JOBS, Denoise, Reports
from deployments.stages.protocol import UnitCall
from deployments.stages.throttle import BURST
from engines.config import ModelConfig
from engines.errors import Cancelled
from engines.spec import Checkpoint, Progress
from engines.units import Steps, UnitOutput

UNIT = Steps(size=1.0)
STATE = torch.Generator().get_state()


class Stage:
    """run: called for each unit with what says whether to stop. begun: the conditioning of each request."""

    engines = ()

    def __init__(self, run: Callable[[Callable[[], bool]], None] = lambda _: None):
        self._run = run
        self.begun: list[Any] = []
        self.at_once = self.most_at_once = 0

    def begin(self, conditioning: Any) -> Any:
        self.begun.append(conditioning)
        return self

    def run(self, unit: Any, tell: Any, should_stop: Any) -> UnitOutput:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self._run(should_stop)
        self.at_once -= 1
        return UnitOutput(torch.zeros(1), "eager")


@pytest.fixture
def replica(monkeypatch: pytest.MonkeyPatch) -> Callable[[Stage], Denoise]:
    def build(stage: Stage) -> Denoise:
        monkeypatch.setattr("deployments.stages.denoise.build_stage", lambda *_: stage)
        return Denoise("a model", ModelConfig())

    return build


class Fetches:
    def __init__(self) -> None:
        self.jobs: list[str] = []

    async def run(self, one: Denoise, job: str, run: str = "a run") -> list[Any]:
        async def fetch() -> Any:
            self.jobs.append(job)
            await asyncio.sleep(0.01)
            return f"of {job}"

        return [item async for item in one.run(UnitCall(run, job, UNIT), fetch)]


async def test_units_run_one_at_a_time_and_a_job_is_fetched_once(replica: Callable[[Stage], Denoise]):
    stage, fetches = Stage(lambda _: threading.Event().wait(0.01)), Fetches()
    one = replica(stage)
    began_at = time.monotonic()
    answers = await asyncio.gather(*(fetches.run(one, job, f"{job}{n}") for n in range(3) for job in "ab"))
    assert 6 * 0.01 <= sum(output.seconds for (output,) in answers) <= time.monotonic() - began_at, "without the waits"
    assert stage.most_at_once == 1
    assert sorted(fetches.jobs) == ["a", "b"]
    assert sorted(stage.begun) == ["of a", "of b"]
    one.forget("a")
    await fetches.run(one, "a")
    assert sorted(fetches.jobs) == ["a", "a", "b"]


async def test_a_conditioning_that_does_not_come_is_asked_for_again(replica: Callable[[Stage], Denoise]):
    one, asked = replica(Stage()), list[int]()

    async def fetch() -> Any:
        asked.append(1)
        if len(asked) == 1:
            raise ConnectionError
        return "conditioning"

    with pytest.raises(ConnectionError):
        [_ async for _ in one.run(UnitCall("1", "a", UNIT), fetch)]
    assert [type(item) async for item in one.run(UnitCall("2", "a", UNIT), fetch)] == [UnitOutput]


async def test_jobs_that_are_not_heard_of_are_dropped(replica: Callable[[Stage], Denoise], monkeypatch: pytest.MonkeyPatch):
    one, fetches = replica(Stage()), Fetches()
    for n in range(MOST_JOBS + 2):
        await fetches.run(one, str(n))
    assert list(one._kept) == [str(n) for n in range(2, MOST_JOBS + 2)]
    monkeypatch.setattr(denoise, "UNHEARD_S", 0.0)
    await fetches.run(one, "new")
    assert list(one._kept) == ["new"]


async def test_a_run_is_stopped_before_it_arrives_while_it_waits_and_while_it_works(replica: Callable[[Stage], Denoise]):
    began = threading.Event()

    def until_stopped(should_stop: Callable[[], bool]) -> None:
        began.set()
        while not should_stop():
            threading.Event().wait(0.005)
        raise Cancelled

    one, fetches = replica(Stage(until_stopped)), Fetches()
    one.stop(["early"])
    with pytest.raises(Cancelled):
        await fetches.run(one, "a", "early")
    working = asyncio.ensure_future(fetches.run(one, "a", "working"))
    waiting = asyncio.ensure_future(fetches.run(one, "b", "waiting"))
    assert await asyncio.to_thread(began.wait, 5)
    await asyncio.sleep(0.05)
    one.stop(["waiting"])
    one.stop(["working", "never there"])
    async with asyncio.timeout(5):
        for each in (working, waiting):
            with pytest.raises(Cancelled):
                await each
    assert one._running == {}


def test_a_step_is_reported_with_its_progress_at_a_limited_rate():
    clock, told = [0.0], list[Any]()
    with Reports(told.append, lambda: clock[0]) as reports:
        reports(Progress("step", 0, 100))
        for done in range(1, 101):
            clock[0] += 0.01
            reports(Checkpoint(done, 100, torch.zeros(1), STATE))
            reports(Progress("step", done, 100))
    steps = [item.step for item in told if isinstance(item, Checkpoint)]
    progress = [item.done for item in told if isinstance(item, Progress)]
    assert progress[:BURST] == list(range(BURST))
    assert progress[-1] == 100
    assert [0, *steps] == progress, "who is told of a step has what it takes to go on from it"
    assert len(steps) <= BURST + 5
