"""Simulated replicas, jobs and time around the real scheduling of units."""

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from deployments.stages.scheduling import Job, Run, Scheduler
from engines.units import Unit

LATENCY_S = 0.004
"""From the sampler to a replica, and back."""


@dataclass(eq=False)
class SimReplica:
    """queue: the runs that have arrived, the first of which runs. speed: how many times as fast as usual."""

    queue: list[Run] = field(default_factory=list)
    speed: float = 1.0
    dead: bool = False
    busy_s: float = 0.0


@dataclass(eq=False)
class SimJob:
    """steps of `units` each. took_s: from its submission to its end."""

    units: int
    steps: int
    unit_s: float = 0.2
    priority: int = 0
    began_at: float = 0.0
    ended_at: float | None = None
    cancelled: bool = False
    left: int = 0
    done: int = 0
    job: Job | None = None
    counted: int = 0

    @property
    def took_s(self) -> float:
        assert self.ended_at is not None
        return self.ended_at - self.began_at


@dataclass(frozen=True, kw_only=True)
class SimUnit(Unit):
    """Unit n of a step. Every second one keeps something at its replica."""

    asked: SimJob
    step: int
    n: int


def unit_of(run: Run) -> SimUnit:
    assert isinstance(run.ticket.unit, SimUnit)
    return run.ticket.unit


class Sim:
    """duration: of a run, in seconds, given its replica's name and its usual time. step_s: the sampler's own time at a step."""

    def __init__(self, duration: Callable[[str, float], float] = lambda _, unit_s: unit_s, step_s: float = 0.005):
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.scheduler = Scheduler(lambda: self.now)
        self.replicas: dict[str, SimReplica] = {}
        self.duration, self.step_s = duration, step_s
        self.alarm = 0
        self.ran: list[tuple[str, tuple[SimJob, int, int]]] = []  # replica; job, step, unit of it
        self.most_at_a_replica = 0

    def at(self, delay_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.now + delay_s, next(self.order), act))

    def run(self, until_s: float = 1e9) -> None:
        while self.events and self.events[0][0] <= until_s:
            self.now, _, act = heapq.heappop(self.events)
            act()

    # Replicas.

    def add(self, name: str, speed: float = 1.0) -> None:
        self.replicas[name] = SimReplica(speed=speed)
        self.scheduler.join(name)
        self.pump()

    def kill(self, name: str) -> None:
        """What runs and waits there is lost; the sampler learns of it by the failure of its calls."""
        replica = self.replicas.pop(name)
        replica.dead = True
        lost, replica.queue = replica.queue, []
        self.at(LATENCY_S, lambda: self._lost(name, lost))

    def _lost(self, name: str, lost: list[Run]) -> None:
        self.scheduler.leave(name)
        for run in lost:
            self.scheduler.ended(run, "lost")
        self.pump()

    def _arrive(self, run: Run) -> None:
        if (replica := self.replicas.get(run.replica)) is None:
            self.at(LATENCY_S, lambda: self._lost(run.replica, [run]))
            return
        replica.queue.append(run)
        self.most_at_a_replica = max(self.most_at_a_replica, len(replica.queue))
        if len(replica.queue) == 1:
            self._begin(run.replica, replica)

    def _begin(self, name: str, replica: SimReplica) -> None:
        run = replica.queue[0]
        unit = unit_of(run)
        took_s = self.duration(name, unit.asked.unit_s) / replica.speed
        self.ran.append((name, (unit.asked, unit.step, unit.n)))
        self.at(took_s, lambda: self._end(name, replica, run, took_s))

    def _end(self, name: str, replica: SimReplica, run: Run, took_s: float) -> None:
        if replica.dead:
            return
        replica.queue.remove(run)
        replica.busy_s += took_s
        how = "stopped" if run.stopping else "answered"
        self.at(LATENCY_S, lambda: self._answer(run, how))
        if replica.queue:
            self._begin(name, replica)

    def _stop(self, run: Run) -> None:
        """A unit that waits is taken out at once; the one that runs cannot be interrupted."""
        replica = self.replicas.get(run.replica)
        if replica is not None and run in replica.queue[1:]:
            replica.queue.remove(run)
            self.at(LATENCY_S, lambda: self._answer(run, "stopped"))

    # The sampler.

    def pump(self) -> None:
        orders = self.scheduler.orders()
        for run in orders.start:
            self.at(LATENCY_S, partial(self._arrive, run))
        for run in orders.stop:
            self.at(LATENCY_S, partial(self._stop, run))
        self.alarm = next(self.order)
        if (due_s := self.scheduler.due_in_s()) is not None:
            self.at(due_s + 1e-6, partial(self._ring, self.alarm))

    def _ring(self, alarm: int) -> None:
        if alarm == self.alarm:
            self.pump()

    def _answer(self, run: Run, how: Any) -> None:
        if self.scheduler.ended(run, how):
            asked = unit_of(run).asked
            asked.counted += 1
            asked.left -= 1
            if not asked.left:
                asked.done += 1
                self.at(self.step_s, lambda: self._step(asked))
        self.pump()

    def submit(self, asked: SimJob) -> SimJob:
        asked.began_at = self.now
        asked.job = self.scheduler.add_job(asked.priority)
        self._step(asked)
        return asked

    def _step(self, asked: SimJob) -> None:
        if asked.cancelled or asked.job is None:
            return
        if asked.done == asked.steps:
            self.scheduler.drop(asked.job)
            asked.ended_at = self.now
        else:
            asked.left = asked.units
            self.scheduler.submit(asked.job, [self._unit(asked, n) for n in range(asked.units)])
        self.pump()

    def _unit(self, asked: SimJob, n: int) -> SimUnit:
        return SimUnit(size=asked.unit_s, keeps=n if n % 2 == 0 else None, asked=asked, step=asked.done, n=n)

    def cancel(self, asked: SimJob) -> None:
        if asked.ended_at is None and asked.job is not None:
            asked.cancelled = True
            self.scheduler.drop(asked.job)
            self.pump()


def pool(replicas: int, **options: Any) -> Sim:
    sim = Sim(**options)
    for n in range(replicas):
        sim.add(f"r{n}")
    return sim
