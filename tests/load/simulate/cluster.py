"""A cluster of simulated replicas that start cold, fail and straggle, driven by events on a made-up clock.

An autoscaler is called as Serve calls it. Its targets are followed as Serve follows them: a new replica is ready after its start;
one too many is stopped while it starts, or ends after the unit in hand, whatever other replicas are idle.
"""

import heapq
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from tests.load.simulate.scheduling import Fifo, Job, Scheduler
from tests.load.simulate.trace import Trace

STAGES = 3


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
    """born: when it was asked for. job: of the unit in hand."""

    born: float
    ready: bool = False
    leaving: bool = False
    gone: bool = False
    job: Job | None = None


@dataclass
class Pool:
    """The replicas of one stage, and the units that wait for them."""

    scheduler: Scheduler
    target: int = 0
    replicas: list[Replica] = field(default_factory=list)
    idle: list[Replica] = field(default_factory=list)
    jobs: dict[Job, None] = field(default_factory=dict)
    held_s: float = 0.0
    work_s: float = 0.0

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
    """Runs a trace. After `run`: what became of the jobs, the changes, and each pool's replica seconds."""

    def __init__(
        self,
        trace: Trace,
        autoscaler: Autoscaler,
        weather: Weather = Weather(),
        scheduler: Callable[[], Scheduler] = Fifo,
        seed: int = 1,
    ):
        self.trace, self.kind, self.autoscaler, self.weather = trace, trace.kind, autoscaler, weather
        self.chance = random.Random(seed)
        self.now = 0.0
        self.pools = [Pool(scheduler()) for _ in range(STAGES)]
        self.changes: list[Change] = []
        self.latencies_s: list[tuple[float, float]] = []  # when it arrived, how long it took
        self.waits_s: list[float] = []
        self.arrived: list[float] = []
        self.ended: list[tuple[float, ...]] = []
        self.unfinished = len(trace.at_s)
        self.most_claimed = 0
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

    def _next_arrival(self, arriving: Iterator[float]) -> None:
        at = next(arriving, None)
        if at is not None:
            self._at(at - self.now, lambda: self._arrive(arriving))

    def _arrive(self, arriving: Iterator[float]) -> None:
        self.arrived.append(self.now)
        self._enter(Job(self.now), 0)
        self._next_arrival(arriving)

    def _tick(self) -> None:
        claimed = sum(0 in job.began for pool in self.pools for job in pool.jobs)
        self.most_claimed = max(self.most_claimed, claimed)
        for stage, (pool, wanted) in enumerate(zip(self.pools, self.autoscaler.targets(self.now, self), strict=True)):
            target = max(self.trace.lowest, min(self.trace.highest, wanted))
            if target != pool.target:
                self.changes.append(Change(self.now, stage, pool.target, target))
                self._scale(pool, target)
        self._at(self.autoscaler.every_s, self._tick)

    def _enter(self, job: Job, stage: int) -> None:
        kind, pool = self.kind, self.pools[stage]
        width, steps = (kind.width, kind.steps) if stage == 1 else (1, 1)
        job.enter(stage, kind.stage_s[stage], width, steps)
        pool.jobs[job] = None
        pool.scheduler.add(job)
        self._work(pool)

    def _scale(self, pool: Pool, target: int) -> None:
        pool.target = target
        while len(pool.replicas) < target:
            self._start(pool)
        while len(pool.replicas) > target:
            replica = next((each for each in reversed(pool.replicas) if not each.ready), None) or self.chance.choice(
                pool.replicas
            )
            pool.replicas.remove(replica)
            if replica.job is None:
                self._end(pool, replica)
            else:
                replica.leaving = True

    def _start(self, pool: Pool) -> None:
        replica = Replica(self.now)
        pool.replicas.append(replica)
        took_s = self.weather.ready_s[self.pools.index(pool)] * self.chance.uniform(0.7, 1.6) / 1.15
        self._at(took_s, lambda: self._ready(pool, replica))
        self._at(took_s + self.chance.expovariate(1 / self.weather.failures_s), lambda: self._fail(pool, replica))

    def _ready(self, pool: Pool, replica: Replica) -> None:
        if not replica.gone:
            replica.ready = True
            pool.idle.append(replica)
            self._work(pool)

    def _fail(self, pool: Pool, replica: Replica) -> None:
        if replica.gone:
            return
        if replica.job is not None:
            pool.scheduler.lost(replica.job)
            replica.job = None
        if not replica.leaving:
            pool.replicas.remove(replica)
            self._start(pool)
        self._end(pool, replica)
        self._work(pool)

    def _end(self, pool: Pool, replica: Replica) -> None:
        replica.gone = True
        pool.held_s += self.now - replica.born

    def _work(self, pool: Pool) -> None:
        while pool.idle:
            replica = pool.idle[-1]
            if replica.gone or replica.leaving:
                pool.idle.pop()
                continue
            job = pool.scheduler.take()
            if job is None:
                return
            pool.idle.pop()
            replica.job = job
            job.began.setdefault(job.stage, self.now)
            slow = self.weather.straggling if self.chance.random() < self.weather.stragglers else 1.0
            self._at(job.unit_s * slow, partial(self._done, pool, replica, job))

    def _done(self, pool: Pool, replica: Replica, job: Job) -> None:
        if replica.job is not job or replica.gone:
            return  # it failed meanwhile
        replica.job = None
        pool.work_s += job.unit_s
        if replica.leaving:
            self._end(pool, replica)
        else:
            pool.idle.append(replica)
        if pool.scheduler.done(job):
            del pool.jobs[job]
            self._leave(job)
        self._work(pool)

    def _leave(self, job: Job) -> None:
        if job.stage + 1 < STAGES:
            self._enter(job, job.stage + 1)
            return
        self.unfinished -= 1
        took_s = self.now - job.arrived
        self.latencies_s.append((job.arrived, took_s))
        self.waits_s.append(job.began[1] - job.arrived)
        self.ended.append(self.kind.stage_s)
