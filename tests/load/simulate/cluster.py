"""A cluster of simulated replicas that start cold, fail and straggle, driven by events on a made-up clock.

An autoscaler is called as Serve calls it. Its targets are followed as Serve follows them: a new replica is ready after its start;
one too many is stopped while it starts, or ends after the units it has, whatever other replicas are idle. Jobs wait in one queue
until there is room for them, as the dispatcher reckons it.
"""

import heapq
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from deployments.dispatch.backlog import STAGES as NAMES
from deployments.dispatch.room import Room
from deployments.stages.protocol import Done
from deployments.stages.scheduling import Run
from deployments.stages.scheduling import Scheduler as Units
from tests.load.simulate.scheduling import Fifo, Job, JobUnit, Scheduler
from tests.load.simulate.trace import Trace

STAGES = len(NAMES)
DENOISE = 1


@dataclass(frozen=True)
class Weather:
    """What goes wrong. ready_s: mean seconds of a start, for CPU and GPU stages; each takes 0.7 to 1.6 of it.

    failures_s: mean seconds until a replica dies. stragglers: share of units that take `straggling` times as long.
    """

    ready_s: tuple[float, float, float] = (10.0, 30.0, 20.0)
    failures_s: float = 6 * 3600.0
    stragglers: float = 0.01
    straggling: float = 4.0


@dataclass(eq=False)
class Replica:
    """born: when it was asked for. runs: of the units at it; the first one works."""

    name: str
    born: float
    ready: bool = False
    leaving: bool = False
    gone: bool = False
    runs: list[Run] = field(default_factory=list)


@dataclass(eq=False)
class Pool:
    """The replicas of one stage, and the units that wait for them. named: all that have joined the scheduler and live."""

    stage: int
    scheduler: Scheduler
    target: int = 0
    replicas: list[Replica] = field(default_factory=list)
    named: dict[str, Replica] = field(default_factory=dict)
    jobs: dict[Job, None] = field(default_factory=dict)
    held_s: float = 0.0
    work_s: float = 0.0
    alarm: int = 0

    @property
    def ready(self) -> int:
        """How many replicas can work."""
        return sum(replica.ready for replica in self.replicas)


class Autoscaler(Protocol):
    """every_s: between two calls."""

    every_s: float

    def targets(self, now: float, cluster: "Cluster") -> list[int]:
        """The replicas that each stage should have."""
        ...


@dataclass(frozen=True)
class Change:
    """The target of a stage changed."""

    at: float
    stage: int
    before: int
    after: int


class Cluster:
    """Runs a trace. After `run`: what became of the jobs, the changes, and each pool's replica seconds.

    queue: jobs that nobody has claimed. ended: of the jobs that have, what replicas worked for each in each stage.
    """

    def __init__(self, trace: Trace, autoscaler: Autoscaler, weather: Weather = Weather(), seed: int = 1):
        self.trace, self.kind, self.autoscaler, self.weather = trace, trace.kind, autoscaler, weather
        self.chance = random.Random(seed)
        self.now = 0.0
        units = Fifo if trace.coarse else Units
        self.pools = [Pool(k, units(lambda: self.now) if k == DENOISE else Fifo()) for k in range(STAGES)]
        self.room = Room()
        self.queue: deque[Job] = deque()
        self.changes: list[Change] = []
        self.latencies_s: list[tuple[float, float]] = []  # when it arrived, how long it took
        self.waits_s: list[float] = []
        self.arrived: list[float] = []
        self.ended: list[list[float]] = []
        self.unfinished = len(trace.at_s)
        self.working = self.most_working = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def run(self) -> "Cluster":
        """Until every job has ended."""
        for pool in self.pools:
            self._scale(pool, self.trace.lowest)
        arriving = iter(self.trace.at_s)
        self._next_arrival(arriving)
        self._tick()
        while self.unfinished and self._events:
            self.now, _, event = heapq.heappop(self._events)
            event()
        for pool in self.pools:
            pool.held_s += sum(self.now - replica.born for replica in pool.replicas)
        return self

    def _at(self, after_s: float, event: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now + after_s, self._count, event))

    # Jobs.

    def _next_arrival(self, arriving: Iterator[float]) -> None:
        at = next(arriving, None)
        if at is not None:
            self._at(at - self.now, lambda: self._arrive(arriving))

    def _arrive(self, arriving: Iterator[float]) -> None:
        self.arrived.append(self.now)
        self.queue.append(Job(self.now))
        self._claim()
        self._next_arrival(arriving)

    def _claim(self) -> None:
        while self.queue and self.working < self.room.jobs:
            self.working += 1
            self.most_working = max(self.most_working, self.working)
            self._enter(self.queue.popleft(), 0)

    def _enter(self, job: Job, stage: int) -> None:
        kind, pool = self.kind, self.pools[stage]
        width, steps = (kind.width, kind.steps) if stage == DENOISE else (1, 1)
        job.enter(stage, kind.stage_s[stage], width, steps)
        pool.jobs[job] = None
        job.scheduled = pool.scheduler.add_job()
        pool.scheduler.submit(job.scheduled, job.units)
        self._pump(pool)

    def _step_done(self, pool: Pool, job: Job) -> None:
        job.step += 1
        if job.step < job.steps:
            job.open = job.width
            pool.scheduler.submit(job.scheduled, job.units)
            return
        pool.scheduler.drop(job.scheduled)
        del pool.jobs[job]
        spent_s = job.spent_s[job.stage]
        self.room.learn(NAMES[job.stage], Done(None, spent_s, busy_s=spent_s, width=job.width))
        if job.stage + 1 < STAGES:
            self._enter(job, job.stage + 1)
            return
        self.unfinished -= 1
        self.working -= 1
        self.latencies_s.append((job.arrived, self.now - job.arrived))
        self.waits_s.append(job.began[DENOISE] - job.arrived)
        self.ended.append(job.spent_s)
        self._claim()

    # Replicas.

    def _tick(self) -> None:
        for pool, wanted in zip(self.pools, self.autoscaler.targets(self.now, self), strict=True):
            target = max(self.trace.lowest, min(self.trace.highest, wanted))
            if target != pool.target:
                self.changes.append(Change(self.now, pool.stage, pool.target, target))
                self._scale(pool, target)
        self._at(self.autoscaler.every_s, self._tick)

    def _scale(self, pool: Pool, target: int) -> None:
        pool.target = target
        while len(pool.replicas) < target:
            self._start(pool)
        while len(pool.replicas) > target:
            replica = next((each for each in reversed(pool.replicas) if not each.ready), None)
            self._leave(pool, replica or self.chance.choice(pool.replicas))

    def _start(self, pool: Pool) -> None:
        self._count += 1
        replica = Replica(str(self._count), self.now)
        pool.replicas.append(replica)
        took_s = self.weather.ready_s[pool.stage] * self.chance.uniform(0.7, 1.6) / 1.15
        self._at(took_s, lambda: self._ready(pool, replica))
        self._at(took_s + self.chance.expovariate(1 / self.weather.failures_s), lambda: self._fail(pool, replica))

    def _ready(self, pool: Pool, replica: Replica) -> None:
        if replica.gone:
            return
        replica.ready = True
        pool.named[replica.name] = replica
        pool.scheduler.join(replica.name)
        self._counted(pool)
        self._pump(pool)

    def _leave(self, pool: Pool, replica: Replica) -> None:
        pool.replicas.remove(replica)
        replica.leaving = True
        pool.scheduler.leave(replica.name)
        self._counted(pool)
        if not replica.runs:
            self._end(pool, replica)

    def _fail(self, pool: Pool, replica: Replica) -> None:
        if replica.gone:
            return
        pool.scheduler.leave(replica.name)
        for run in replica.runs:
            pool.scheduler.ended(run, "lost")
        replica.runs.clear()
        if not replica.leaving:
            pool.replicas.remove(replica)
            self._start(pool)
        self._end(pool, replica)
        self._counted(pool)
        self._pump(pool)

    def _end(self, pool: Pool, replica: Replica) -> None:
        replica.gone = True
        pool.named.pop(replica.name, None)
        pool.held_s += self.now - replica.born

    def _counted(self, pool: Pool) -> None:
        if pool.stage == DENOISE:
            self.room.replicas(pool.ready)
            self._claim()

    # Units.

    def _pump(self, pool: Pool) -> None:
        """Does what the scheduler orders now, and looks again when time alone will change that."""
        while (orders := pool.scheduler.orders()).start or orders.stop:
            for run in orders.start:
                replica = pool.named[run.replica]
                replica.runs.append(run)
                if len(replica.runs) == 1:
                    self._begin(pool, replica)
            for run in orders.stop:
                stopping = pool.named.get(run.replica)
                if stopping is not None and run in stopping.runs[1:]:  # the first one is a call of a net, which goes on
                    stopping.runs.remove(run)
                    pool.scheduler.ended(run, "stopped")
        if (due_s := pool.scheduler.due_in_s()) is not None:
            pool.alarm += 1
            self._at(due_s + 1e-6, partial(self._ring, pool, pool.alarm))

    def _ring(self, pool: Pool, alarm: int) -> None:
        if alarm == pool.alarm:
            self._pump(pool)

    def _begin(self, pool: Pool, replica: Replica) -> None:
        run = replica.runs[0]
        job = _job_of(run)
        job.began.setdefault(pool.stage, self.now)
        slow = self.weather.straggling if self.chance.random() < self.weather.stragglers else 1.0
        took_s = run.ticket.unit.size * slow
        self._at(took_s, partial(self._done, pool, replica, run, took_s))

    def _done(self, pool: Pool, replica: Replica, run: Run, took_s: float) -> None:
        if replica.gone:
            return  # it failed meanwhile
        replica.runs.remove(run)
        job = _job_of(run)
        if job.stage == pool.stage:
            job.spent_s[pool.stage] += took_s
        counts = pool.scheduler.ended(run, "stopped" if run.stopping else "answered")
        if replica.runs:
            self._begin(pool, replica)
        elif replica.leaving:
            self._end(pool, replica)
        if counts:
            pool.work_s += run.ticket.unit.size
            job.open -= 1
            if not job.open:
                self._step_done(pool, job)
        self._pump(pool)


def _job_of(run: Run) -> Job:
    assert isinstance(run.ticket.unit, JobUnit)
    return run.ticket.unit.job
