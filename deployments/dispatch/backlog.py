"""The load of every stage in seconds of one replica's work, read from the database by a thread.

Whoever asks gets the last reading at once, with the time when it was made: the autoscaling runs in Serve's control loop, which
must not wait for a database. A reading that fails leaves the one before, which grows old.
"""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, get_args

from deployments.jobs.database import OUTAGE_PAUSE_S, Database
from deployments.jobs.work import Arrived, Measured, Running, StageStatus, Units, Waiting, Work, stages
from deployments.stages.progress import Stage

logger = logging.getLogger("ray.serve")  # the only one that is shown in Serve's controller

STAGES: tuple[Stage, ...] = get_args(Stage)
INTERVAL_S = 1.0
"""Between two readings."""
SHARE = 0.05
"""The share of the time that reading may take: where it takes longer, as with a million jobs waiting, it is done less often."""
PAUSE_S = 10.0
"""The longest pause between two readings: a database that stood still for a while is read again before its reading is stale."""
ARRIVALS_S = (10.0, 60.0)
"""Over so many seconds arriving work is averaged; the larger average counts."""
READY_S = 30.0
"""How long a new replica is taken to need until that has been measured."""
MEMORY = 0.98
"""The weight of a measured job with every later one: about the last fifty count."""


class Scaled(Protocol):
    """An endpoint whose stages are scaled; see `deployments.settings.ScaledEndpoint`."""

    @property
    def id(self) -> str:
        """The endpoint's."""
        ...

    @property
    def family(self) -> str:
        """Prefix of its deployments' names."""
        ...

    @property
    def unit_times(self) -> Units:
        """Seconds a unit takes in each stage, as long as none has been measured."""
        ...

    @property
    def drain_s(self) -> float:
        """In how many seconds what waits should be worked off, once replicas for it are ready."""
        ...

    @property
    def idle_s(self) -> float:
        """For how many seconds fewer replicas must have been enough before there are fewer."""
        ...


@dataclass(frozen=True)
class StageLoad:
    """The work of one stage, in seconds that one replica takes for it.

    waiting_s: of what no replica works on yet, here or in an earlier stage, and of a job at work what others could take over.
    running_s: of what is left of the jobs at work otherwise. arriving: seconds of work that arrive every second.
    busy: jobs at work. parallel: calls that could be at work, with what waits. job_s: of an average job that waits or runs.
    here_s: of `waiting_s`, what no earlier stage has to work on first.
    """

    waiting_s: float = 0.0
    running_s: float = 0.0
    arriving: float = 0.0
    busy: float = 0.0
    parallel: float = 0.0
    job_s: float = 0.0
    here_s: float = 0.0


@dataclass(frozen=True)
class Reading:
    """endpoints: endpoint -> the load of its stages, in the order of `STAGES`. at: when it was made, by the reader's clock.

    ready_s: deployment -> how long its new replicas took, as an earlier process has measured.
    """

    at: float
    endpoints: Mapping[Scaled, Sequence[StageLoad]]
    ready_s: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """What the autoscaling has made of a stage's load. ready_s: how long a new replica takes, as measured."""

    replicas: int
    target: int
    backlog_s: float
    ready_s: float


class Pace:
    """How long a unit of a stage's work takes, from the jobs that have ended."""

    def __init__(self, prior_s: float):
        self._prior_s = prior_s
        self._seconds = self._units = 0.0

    def add(self, units: float, seconds: object) -> None:
        """A job's units and the seconds they took. What cannot be is left out."""
        if isinstance(seconds, int | float) and 0 < seconds < math.inf and 0 < units < math.inf:
            self._seconds = MEMORY * self._seconds + seconds
            self._units = MEMORY * self._units + units

    @property
    def unit_s(self) -> float:
        """Seconds a unit."""
        return self._seconds / self._units if self._units else self._prior_s


class BacklogReader:
    """find: the database's URL and the endpoints; it is called in the thread, and again after each failure. It may raise."""

    def __init__(self, find: Callable[[], tuple[str, Sequence[Scaled]]], clock: Callable[[], float] = time.monotonic):
        self._find = find
        self._clock = clock
        self._stopped = threading.Event()
        self.thread: threading.Thread | None = None
        self.reading: Reading | None = None
        """The last one."""
        self.decisions: Mapping[str, Decision] = {}
        """Deployment -> what was decided last, to be written beside the next reading."""

    def start(self) -> None:
        """Starts the thread, which ends with the process or after `stop`."""
        self.thread = threading.Thread(target=lambda: asyncio.run(self._read_forever()), name="reelray-backlog", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Ends the thread soon."""
        self._stopped.set()

    async def _read_forever(self) -> None:
        while not self._stopped.is_set():
            try:
                url, endpoints = self._find()
                database = await Database.open(url, max_connections=1)
                try:
                    await self._read_until_stopped(database, endpoints)
                finally:
                    await database.close()
            except Exception:
                logger.exception("the backlog cannot be read; replicas stay as they are", extra={"action": "backlog_unknown"})
                await asyncio.sleep(OUTAGE_PAUSE_S)

    async def _read_until_stopped(self, database: Database, endpoints: Sequence[Scaled]) -> None:
        work = Work(database, [each.id for each in endpoints])
        known = {(status.endpoint, status.stage): status for status, _ in await stages(database)}
        names = {(each.id, stage): name_of(each, stage) for each in endpoints for stage in STAGES}
        ready_s = {names[place]: status.ready_s for place, status in known.items() if place in names}
        paces = {each.id: [_pace(each, k, known) for k in range(len(STAGES))] for each in endpoints}
        while not self._stopped.is_set():
            began = self._clock()
            learn(paces, await work.measured())
            waiting, running, arrived = await work.waiting(), await work.running(), await work.arrived(ARRIVALS_S)
            found = {
                each: loads(
                    [pace.unit_s for pace in paces[each.id]],
                    waiting.get(each.id),
                    [job for job in running if job.endpoint == each.id],
                    arrived.get(each.id, ()),
                )
                for each in endpoints
            }
            self.reading = Reading(self._clock(), found, ready_s)
            if rows := list(_statuses(endpoints, paces, self.decisions)):
                await work.save(rows)
            await asyncio.sleep(max(INTERVAL_S, min((self._clock() - began) / SHARE, PAUSE_S)))


def name_of(endpoint: Scaled, stage: str) -> str:
    """The name of a stage's deployment."""
    return f"{endpoint.family}-{stage}"


def learn(paces: Mapping[str, Sequence[Pace]], measured: Iterable[Measured]) -> None:
    """Adds jobs that have ended to their endpoints' paces."""
    for job in measured:
        for pace, stage, units in zip(paces[job.endpoint], STAGES, job.units, strict=True):
            pace.add(units, job.seconds.get(stage))


def loads(
    unit_s: Sequence[float], waiting: Waiting | None, running: Sequence[Running], arrived: Iterable[Arrived] = ()
) -> list[StageLoad]:
    """The load of an endpoint's stages. unit_s: seconds a unit in each.

    Of n jobs that arrived the root of n is taken off, the standard deviation of a random stream's count: one arrival is no rate.
    """
    found = []
    for k in range(len(STAGES)):
        units = waiting.units[k] if waiting else 0.0
        parallel = 0.0 if waiting is None else waiting.parallel if STAGES[k] == "denoise" else waiting.jobs
        left = busy = of_running = 0.0
        here = units if k == 0 else 0.0
        for job in running:
            width = float(job.parallel) if STAGES[k] == "denoise" else 1.0
            stage, fraction = _place(job)
            of_running += job.units[k]
            if stage > k:
                continue
            parallel += width
            if stage < k or fraction is None:
                units += job.units[k]
                here += job.units[k] * (stage == k)
                continue
            rest = job.units[k] * (1 - fraction)
            units += rest * (1 - 1 / width)  # what further replicas could take over
            here += rest * (1 - 1 / width)
            left += rest / width
            busy += 1
        jobs = len(running) + (waiting.jobs if waiting else 0.0)
        job_s = (of_running + (waiting.units[k] if waiting else 0.0)) / jobs * unit_s[k] if jobs else 0.0
        arriving = max((each.units[k] * (1 - each.jobs**-0.5) / each.within_s for each in arrived), default=0.0) * unit_s[k]
        found.append(StageLoad(units * unit_s[k], left * unit_s[k], arriving, busy, parallel, job_s, here * unit_s[k]))
    return found


def _place(job: Running) -> tuple[int, float | None]:
    """The place in `STAGES` of a running job's stage, and the fraction of it that is done; None: the job waits for its turn."""
    if job.stage not in STAGES or not isinstance(job.fraction, int | float) or not 0 <= job.fraction <= 1:
        return 0, None  # it has told nothing yet
    stage = STAGES.index(job.stage)
    return (stage, job.fraction) if job.fraction < 1 else (stage + 1, None)


def _pace(endpoint: Scaled, k: int, known: Mapping[tuple[str, str], StageStatus]) -> Pace:
    status = known.get((endpoint.id, STAGES[k]))
    return Pace(status.unit_s if status is not None and 0 < status.unit_s < math.inf else endpoint.unit_times[k])


def _statuses(
    endpoints: Sequence[Scaled], paces: Mapping[str, Sequence[Pace]], decisions: Mapping[str, Decision]
) -> Iterable[StageStatus]:
    for each in endpoints:
        for stage, pace in zip(STAGES, paces[each.id], strict=True):
            if (made := decisions.get(name_of(each, stage))) is not None:
                yield StageStatus(each.id, stage, pace.unit_s, made.ready_s, made.backlog_s, made.replicas, made.target)
