"""What the cluster needs of the product's scheduling of units, and a queue with the same interface for the other stages."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from deployments.stages.scheduling import Job as Scheduled
from deployments.stages.scheduling import Orders, Run, Ticket
from engines.units import Unit


@dataclass(eq=False)
class Job:
    """arrived: when. unit_s: seconds of one replica for each unit in this stage. width, steps: as in `trace.Kind`.

    open: units of the step that are not done. step: how many are. began: stage -> when its first unit began. spent_s: by stage,
    what replicas have worked for it. scheduled: what the stage's scheduler knows it as.
    """

    arrived: float
    stage: int = 0
    unit_s: float = 0.0
    width: int = 1
    steps: int = 1
    open: int = 0
    step: int = 0
    began: dict[int, float] = field(default_factory=dict)
    spent_s: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    scheduled: Any = None

    def enter(self, stage: int, seconds: float, width: int, steps: int) -> None:
        """The job comes to a stage, with `seconds` of work in it."""
        self.stage, self.width, self.steps, self.step = stage, width, steps, 0
        self.unit_s = seconds / (width * steps)
        self.open = width

    @property
    def units(self) -> list["JobUnit"]:
        """Those of its next step."""
        return [JobUnit(size=self.unit_s, keeps=n if self.width > 1 else None, job=self) for n in range(self.width)]

    @property
    def fraction(self) -> float:
        """Of the stage's work that is done."""
        return (self.step + 1 - self.open / self.width) / self.steps


@dataclass(frozen=True, kw_only=True)
class JobUnit(Unit):
    """A unit of a job."""

    job: Job


class Scheduler(Protocol):
    """What the cluster needs of `deployments.stages.scheduling.Scheduler`, which says what each call means."""

    def join(self, name: str) -> None: ...

    def leave(self, name: str) -> None: ...

    def add_job(self, priority: int = 0) -> Scheduled: ...

    def submit(self, job: Scheduled, units: Sequence[Unit]) -> list[Ticket]: ...

    def drop(self, job: Scheduled) -> None: ...

    def ended(self, run: Run, how: Literal["answered", "stopped", "lost"]) -> bool: ...

    def orders(self) -> Orders: ...

    def due_in_s(self) -> float | None: ...


class Fifo:
    """The oldest unit first, one at a replica: as calls wait at a handle of Serve. What was lost comes first again."""

    def __init__(self, _: Any = None) -> None:
        self._waiting: deque[Ticket] = deque()
        self._idle: dict[str, None] = {}
        self._left: set[str] = set()

    def join(self, name: str) -> None:
        self._idle[name] = None

    def leave(self, name: str) -> None:
        self._idle.pop(name, None)
        self._left.add(name)

    def add_job(self, priority: int = 0) -> Scheduled:
        return Scheduled(priority, 0)

    def submit(self, job: Scheduled, units: Sequence[Unit]) -> list[Ticket]:
        tickets = [Ticket(job, 0, unit) for unit in units]
        self._waiting.extend(tickets)
        return tickets

    def drop(self, job: Scheduled) -> None:
        pass

    def ended(self, run: Run, how: Literal["answered", "stopped", "lost"]) -> bool:
        if run.replica not in self._left:
            self._idle[run.replica] = None
        if how == "lost":
            self._waiting.appendleft(run.ticket)
        return how == "answered"

    def orders(self) -> Orders:
        count = min(len(self._idle), len(self._waiting))
        return Orders([Run(self._waiting.popleft(), self._idle.popitem()[0], 0.0) for _ in range(count)], [])

    def due_in_s(self) -> float | None:
        return None
