import pytest

from deployments.dispatch.watchdog import Watchdog
from deployments.settings import Deadlines, QueueSettings
from engines.errors import GenerationTimeout, RunnerStalled


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watchdog(clock: Clock) -> Watchdog:
    return Watchdog(Deadlines(run_s=100, idle_s=10), clock)


def test_a_run_ends_at_its_deadline_however_busy(watchdog: Watchdog, clock: Clock) -> None:
    for _ in range(20):
        assert watchdog.overdue() is None
        watchdog.working()
        clock.now += 5
    assert isinstance(watchdog.overdue(), GenerationTimeout)
    assert watchdog.due_in_s() == 0


def test_a_stage_at_work_must_say_so(watchdog: Watchdog, clock: Clock) -> None:
    watchdog.working()
    clock.now += 9
    assert (watchdog.due_in_s(), watchdog.overdue()) == (1, None)
    watchdog.working()
    clock.now += 10
    assert isinstance(watchdog.overdue(), RunnerStalled)


def test_waiting_for_a_turn_is_no_standstill(watchdog: Watchdog, clock: Clock) -> None:
    clock.now += 50
    assert watchdog.overdue() is None
    watchdog.working()
    watchdog.waiting()
    clock.now += 40
    assert (watchdog.due_in_s(), watchdog.overdue()) == (10, None)


def test_an_endpoint_has_its_own_deadlines_or_the_defaults() -> None:
    queue = QueueSettings.model_validate({"deadlines": {"fal-ai/controlnext": {"run_s": 60}}})
    assert queue.deadlines_of("fal-ai/controlnext") == Deadlines(run_s=60)
    assert queue.deadlines_of("fal-ai/animatediff-sparsectrl-lcm") == Deadlines()
