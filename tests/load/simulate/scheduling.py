"""Which unit an idle replica gets next: the interface, and the simplest order. The product's own scheduler can take its place."""

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(eq=False)
class Job:
    """arrived: when. unit_s: seconds of one replica for each unit in this stage. width, steps: as in `trace.Kind`.

    ready: units of the step that nobody has taken. open: units of the step that are not done. step: of `steps`.
    """

    arrived: float
    stage: int = 0
    unit_s: float = 0.0
    width: int = 1
    steps: int = 1
    ready: int = 0
    open: int = 0
    step: int = 0
    began: dict[int, float] = field(default_factory=dict)

    def enter(self, stage: int, seconds: float, width: int, steps: int) -> None:
        """The job comes to a stage, with `seconds` of work in it."""
        self.stage, self.width, self.steps, self.step = stage, width, steps, 0
        self.unit_s = seconds / (width * steps)
        self.ready = self.open = width

    @property
    def fraction(self) -> float:
        """Of the stage's work that is done."""
        return (self.step + 1 - self.open / self.width) / self.steps


class Scheduler(Protocol):
    """The units of one stage's jobs, all alike within a job."""

    def add(self, job: Job) -> None:
        """A job has come to the stage."""
        ...

    def take(self) -> Job | None:
        """The job of which the next unit is to run; None: there is no unit to run."""
        ...

    def done(self, job: Job) -> bool:
        """A unit of the job has been done. True: it was the job's last."""
        ...

    def lost(self, job: Job) -> None:
        """A unit of the job was lost with its replica, and has to run again."""
        ...


class Fifo:
    """Units of the oldest job first."""

    def __init__(self) -> None:
        self._ready: deque[Job] = deque()

    def add(self, job: Job) -> None:
        """See `Scheduler`."""
        self._ready.append(job)

    def take(self) -> Job | None:
        """See `Scheduler`."""
        if not self._ready:
            return None
        job = self._ready[0]
        job.ready -= 1
        if not job.ready:
            self._ready.popleft()
        return job

    def done(self, job: Job) -> bool:
        """See `Scheduler`."""
        job.open -= 1
        if job.open:
            return False
        job.step += 1
        if job.step == job.steps:
            return True
        job.ready = job.open = job.width
        self._ready.appendleft(job)
        return False

    def lost(self, job: Job) -> None:
        """See `Scheduler`."""
        job.ready += 1
        if job.ready == 1:
            self._ready.appendleft(job)
