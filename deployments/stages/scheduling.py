"""Which unit of work runs on which replica, and when. Pure code: it knows neither Ray nor the time, so a simulator can drive it.

Units of all jobs of a sampler wait in one place. The next one is of the most urgent priority, then of the job that has had the
least work done for it, then the oldest. Idle replicas come first. At most two units are at a replica: the second waits there with
its data, so that the replica goes on at once. Where jobs share the replicas it is sent as late as that allows: a step of another
job, whose turn it would take, may be about to end.

A unit prefers a replica that has run its namesake of an earlier step and still holds what both need; if none of those is free, it
runs on any. When nothing waits and a replica is idle, that takes over a unit which waits behind another, or runs a straggler a
second time: the first answer counts. A lost unit waits again, in its old place.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from statistics import median
from typing import Literal

from engines.units import Unit

MOST_AT_A_REPLICA = 2
LEAST_SHARE = 0.25
"""Every job gets this part of an equal share at least, whatever its priority: no stream of other jobs stops it."""
STRAGGLES, STRAGGLES_S = 3.0, 0.5
"""A unit straggles that takes so many times as long as usual, and so many seconds longer: short ones vary more."""
LEAD = 0.25
"""When the second unit is sent to a replica: so much of the first one's usual time before its end, at least `LEAD_S` seconds."""
LEAD_S = 0.05
SAMPLES = 3
"""How many units must have ended before their median says what is usual."""


@dataclass(eq=False)
class Job:
    """A job's units. had: the size of its units that were sent, from where the others stood when it came.

    served_at: how many units had been sent when it was served last, or came.
    owners: `keeps` of a unit -> replicas that have run one of that name. known: the replicas that have run any.
    """

    priority: int
    served_at: int
    had: float = -inf
    waiting: dict[int, "Ticket"] = field(default_factory=dict)  # age -> ticket, oldest first
    open: set["Ticket"] = field(default_factory=set)
    owners: dict[int, set[str]] = field(default_factory=dict)
    known: dict[str, None] = field(default_factory=dict)
    paces: "Paces" = field(default_factory=lambda: Paces())


@dataclass(eq=False)
class Ticket:
    """A unit that waits or is at one replica or more. losses: how often it was lost with its replica.

    over: it has its answer, or nobody waits for it any more.
    """

    job: Job
    age: int
    unit: Unit
    runs: list["Run"] = field(default_factory=list)
    losses: int = 0
    over: bool = False


@dataclass(eq=False)
class Run:
    """A unit at a replica. began_at: when its turn came there; None while it waits behind another."""

    ticket: Ticket
    replica: str
    began_at: float | None = None
    stopping: bool = False

    def took_s(self, now: float) -> float:
        """How long its turn has lasted, in seconds."""
        return 0.0 if self.began_at is None else now - self.began_at


@dataclass(eq=False)
class Replica:
    """runs: those at it, in the order in which they run. leaving: it gets no more."""

    runs: list[Run] = field(default_factory=list)
    leaving: bool = False


class Paces:
    """The median time of the last units, per size."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=32)
        self._median: float | None = None

    def add(self, seconds: float, size: float) -> None:
        """Takes a unit's time."""
        self._last.append(seconds / size)
        self._median = None

    def expected_s(self, size: float) -> float | None:
        """The usual time of a unit in seconds; None until there are enough."""
        if len(self._last) < SAMPLES:
            return None
        if self._median is None:
            self._median = median(self._last)
        return self._median * size


@dataclass(frozen=True)
class Orders:
    """What the driver is to do. start: runs to send to their replicas. stop: runs to end early; they are reported as usual."""

    start: list[Run]
    stop: list[Run]


class Scheduler:
    """clock: in seconds. After every call that changes something, the driver asks for `orders`, and again after `due_in_s`."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._ages = itertools.count()
        self._sent = 0
        self._jobs: dict[Job, None] = {}
        self._replicas: dict[str, Replica] = {}
        self._stops: list[Run] = []
        self.paces = Paces()

    # What the driver reports.

    def join(self, name: str) -> None:
        """A replica has come, or is wanted again."""
        self._replicas.setdefault(name, Replica()).leaving = False

    def leave(self, name: str) -> None:
        """A replica gets no more units. Those at it may still be answered."""
        if (replica := self._replicas.get(name)) is None:
            return
        replica.leaving = True
        for job in self._jobs:
            job.known.pop(name, None)
            for owners in job.owners.values():
                owners.discard(name)
        if not replica.runs:
            del self._replicas[name]

    def add_job(self, priority: int = 0) -> Job:
        """A new job. priority: a lower one comes first."""
        job = Job(priority, served_at=self._sent)
        self._jobs[job] = None
        return job

    def submit(self, job: Job, units: Sequence[Unit]) -> list[Ticket]:
        """These units wait from now on: all that the job can do before they are done.

        A job that had nothing waiting while others went on catches up, but by these units at most. So does a new one: with those
        that have been served, not with others that are new.
        """
        tickets = [Ticket(job, next(self._ages), unit) for unit in units]
        job.open.update(tickets)
        job.waiting |= {ticket.age: ticket for ticket in tickets}
        size = sum(unit.size for unit in units)
        others = (other.had for other in self._jobs if other is not job and other.open and other.known)
        job.had = max(job.had, min(others, default=size) - size)
        return tickets

    def drop(self, job: Job) -> None:
        """The job has ended or is cancelled: its units are taken out, and those at replicas are stopped."""
        self._jobs.pop(job, None)
        job.waiting.clear()
        for ticket in job.open:
            self._close(ticket)
        job.open.clear()

    def ended(self, run: Run, how: Literal["answered", "stopped", "lost"]) -> bool:
        """A run is no longer at its replica. True: its answer is the unit's."""
        ticket, replica, now = run.ticket, self._replicas[run.replica], self._clock()
        replica.runs.remove(run)
        ticket.runs.remove(run)
        if replica.runs and replica.runs[0].began_at is None:
            replica.runs[0].began_at = now
        if replica.leaving and not replica.runs:
            del self._replicas[run.replica]
        if how == "answered" and not ticket.over:
            if run.began_at is not None:
                for paces in (ticket.job.paces, self.paces):
                    paces.add(run.took_s(now), ticket.unit.size)
            if ticket.unit.keeps is not None and not replica.leaving:
                ticket.job.owners.setdefault(ticket.unit.keeps, set()).add(run.replica)
            ticket.job.open.discard(ticket)
            self._close(ticket)
            return True
        ticket.losses += how == "lost"
        if not ticket.over and not ticket.runs:
            ticket.job.waiting = dict(sorted({**ticket.job.waiting, ticket.age: ticket}.items()))
        return False

    # What the driver is told.

    def orders(self) -> Orders:
        """What is to be done now; the starts and stops count as done."""
        starts = list(self._starts())
        stops, self._stops = self._stops, []
        return Orders(starts, stops)

    def due_in_s(self) -> float | None:
        """Seconds until time alone changes what is to be done; None: it does not."""
        now = self._clock()
        waits = any(job.waiting for job in self._jobs)
        idle = any(not replica.runs and not replica.leaving for replica in self._replicas.values())
        times: list[float] = []
        for replica in self._replicas.values():
            head = replica.runs[0] if replica.runs else None
            expected_s = None if head is None else self._expected_s(head.ticket)
            if head is None or head.began_at is None or expected_s is None:
                continue
            if waits and len(replica.runs) < MOST_AT_A_REPLICA:
                times.append(head.began_at + expected_s - _lead_s(expected_s))
            if idle and not waits and not head.stopping and len(head.ticket.runs) == 1:
                times.append(head.began_at + _straggles_after_s(expected_s))
            if idle and not waits and len(replica.runs) > 1:
                times.append(head.began_at + expected_s + _lead_s(expected_s))
        coming = [time - now for time in times if time > now]
        return min(coming, default=None)

    @property
    def replicas(self) -> int:
        """How many replicas get units."""
        return sum(not replica.leaving for replica in self._replicas.values())

    @property
    def waiting_s(self) -> float | None:
        """The work that waits, in seconds of one replica; None until the pace is known."""
        size = sum(ticket.unit.size for job in self._jobs for ticket in job.waiting.values())
        return self.paces.expected_s(size)

    @property
    def at_rest(self) -> bool:
        """Whether there is no job, and no run at any replica."""
        return not self._jobs and not any(replica.runs for replica in self._replicas.values())

    # How it decides.

    def _starts(self) -> Iterator[Run]:
        while (found := self._next()) is not None:
            ticket, name = found
            replica = self._replicas[name]
            run = Run(ticket, name, began_at=None if replica.runs else self._clock())
            ticket.job.waiting.pop(ticket.age, None)
            ticket.job.had += ticket.unit.size
            ticket.job.served_at = self._sent
            ticket.job.known[name] = None
            replica.runs.append(run)
            ticket.runs.append(run)
            self._sent += 1
            yield run

    def _next(self) -> tuple[Ticket, str] | None:
        idle = {name: None for name, replica in self._replicas.items() if not replica.runs and not replica.leaving}
        waiting = [job for job in self._jobs if job.waiting]
        job = min(waiting, key=lambda job: (job.priority, job.had, job.served_at), default=None)
        if overdue := [job for job in waiting if self._sent - job.served_at >= len(self._jobs) / LEAST_SHARE]:
            job = min(overdue, key=lambda job: job.served_at)
        if job is None:
            return self._again(next(iter(idle))) if idle else None
        free = idle or {name: None for name, replica in self._replicas.items() if self._takes_a_second(replica)}
        return self._match(job, free) if free else None

    def _match(self, job: Job, free: dict[str, None]) -> tuple[Ticket, str]:
        """The unit that its job sends next, and where to. free: replicas to choose from."""
        chosen: Ticket | None = None
        for ticket in job.waiting.values():
            owners = job.owners.get(ticket.unit.keeps, ()) if ticket.unit.keeps is not None else ()
            if owner := next((name for name in owners if name in free), None):
                return ticket, owner
            if chosen is None or (not owners and self._is_owned(chosen)):
                chosen = ticket
        assert chosen is not None
        return chosen, next((name for name in job.known if name in free), None) or next(iter(free))

    def _is_owned(self, ticket: Ticket) -> bool:
        return ticket.unit.keeps is not None and bool(ticket.job.owners.get(ticket.unit.keeps))

    def _takes_a_second(self, replica: Replica) -> bool:
        """Whether a unit is to wait at this replica behind the one that runs."""
        if replica.leaving or len(replica.runs) != MOST_AT_A_REPLICA - 1:
            return False
        (head,) = replica.runs
        expected_s = self._expected_s(head.ticket)
        if head.began_at is None or expected_s is None:
            return True
        ran_s = self._clock() - head.began_at
        if ran_s > _straggles_after_s(expected_s):
            return False
        return len(self._jobs) == 1 or ran_s >= expected_s - _lead_s(expected_s)

    def _again(self, idle: str) -> tuple[Ticket, str] | None:
        """A unit at another replica for one that is idle, since nothing waits."""
        now, straggler = self._clock(), None
        for replica in self._replicas.values():
            if not replica.runs:
                continue
            head, *behind = replica.runs
            expected_s = self._expected_s(head.ticket)
            if expected_s is None or head.began_at is None:
                continue
            ran_s = now - head.began_at
            if behind and _alone(behind[0]) and abs(expected_s - ran_s) > _lead_s(expected_s):
                self._stop(behind[0])
                return behind[0].ticket, idle
            if straggler is None and _alone(head) and ran_s >= _straggles_after_s(expected_s):
                straggler = head.ticket
        return None if straggler is None else (straggler, idle)

    def _expected_s(self, ticket: Ticket) -> float | None:
        own_s = ticket.job.paces.expected_s(ticket.unit.size)
        return self.paces.expected_s(ticket.unit.size) if own_s is None else own_s

    def _close(self, ticket: Ticket) -> None:
        ticket.over = True
        for run in ticket.runs:
            self._stop(run)

    def _stop(self, run: Run) -> None:
        if not run.stopping:
            run.stopping = True
            self._stops.append(run)


def _alone(run: Run) -> bool:
    """Whether this run is the only one of a unit that is still wanted."""
    return not run.stopping and not run.ticket.over and len(run.ticket.runs) == 1


def _lead_s(expected_s: float) -> float:
    return max(LEAD * expected_s, LEAD_S)


def _straggles_after_s(expected_s: float) -> float:
    return max(STRAGGLES * expected_s, expected_s + STRAGGLES_S)
