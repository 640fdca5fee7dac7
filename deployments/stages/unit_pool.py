"""Runs the units of a sampler's jobs on the replicas that there are, as `scheduling.py` decides.

A replica is used once it has told its arithmetic. After a call to it has failed it is asked again before it gets more. A unit
that was lost with its replica runs elsewhere. All calls to replicas are made in this object's own context: Serve would cancel
those that are made in a job's, although other jobs may need them.
"""

import asyncio
import contextvars
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any
from uuid import uuid4

from deployments import metrics
from deployments.stages.protocol import Replicas, UnitCall
from deployments.stages.scheduling import Job, Run, Scheduler, Ticket
from engines.errors import Cancelled, ReelrayError, RunnerDisconnected, RunnerFailed
from engines.spec import Checkpoint
from engines.units import Report, Unit, UnitOutput

logger = logging.getLogger(__name__)

MOST_LOSSES = 3
"""A unit that was lost with so many replicas is given up: it may be what ends them."""
AGAIN_S = 1.0
"""How long a replica to which a call has failed is left alone, in seconds."""
ANSWER_S = 30.0
"""How long a replica may take to tell its arithmetic, in seconds."""

Answers = SimpleQueue[tuple[int, Report | UnitOutput | Exception]]


@dataclass
class Worker:
    """What a replica has done for a job. units: how many of its answers counted. began, ended: in seconds since 1970."""

    began: float
    ended: float
    units: int = 0
    busy_s: float = 0.0


class PooledJob:
    """A `UnitRunner` for one job. conditioning: a reference, for the replicas. begun: set once a unit is sent to a replica.

    width: the most units that it could do at once. busy_s: what replicas have worked for it, in seconds. workers: what each
    replica has done, by its name. traceparent: of its calls.
    """

    def __init__(self, pool: "UnitPool", conditioning: Any, priority: int, traceparent: str | None = None):
        self.name = uuid4().hex
        self.conditioning = conditioning
        self.begun = asyncio.Event()
        self.width, self.busy_s = 1, 0.0
        self.workers: dict[str, Worker] = {}
        self.asked_at = 0.0
        self.traceparent = traceparent
        self.runs: Counter[str] = Counter()  # of its units, by replica; 0: none any more
        self.job: Job = pool.scheduler.add_job(priority)
        self.places: dict[Ticket, int] = {}
        self.answers: Answers = SimpleQueue()
        self.closed = False
        self._pool = pool
        self._loop = asyncio.get_running_loop()

    def run(self, units: Sequence[Unit], tell: Callable[[Report], None]) -> Iterator[tuple[int, UnitOutput]]:
        """See `UnitRunner`. To be called in another thread than the event loop's."""
        self._loop.call_soon_threadsafe(self._pool.submit, self, units)
        left = len(units)
        while left:
            place, answer = self.answers.get()
            if isinstance(answer, Exception):
                raise answer
            if isinstance(answer, UnitOutput):
                left -= 1
                yield place, answer
            else:
                tell(answer)

    @property
    def units(self) -> int:
        """How many have answered."""
        return sum(worker.units for worker in self.workers.values())

    def worked(self, replica: str, seconds: float, *, answered: bool) -> None:
        """The replica has just worked for the job. answered: with an answer that counts."""
        now = time.time()
        worker = self.workers.setdefault(replica, Worker(now - seconds, now))
        worker.ended = now
        worker.units += answered
        worker.busy_s += seconds
        self.busy_s += seconds

    def close(self) -> None:
        """Ends the job, whose units then stop. Its thread, if it still waits for units, raises `Cancelled`."""
        self._pool.close(self, Cancelled())


class UnitPool:
    """replicas: those of one endpoint, whose id is for the metrics. clock: in seconds."""

    def __init__(self, replicas: Replicas, clock: Callable[[], float] = time.monotonic, *, endpoint: str = ""):
        self.endpoint = endpoint
        self.scheduler = Scheduler(clock)
        self._replicas = replicas
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()
        self._listed: frozenset[str] = frozenset()
        self._arithmetic: dict[str, str] = {}
        self._joined = asyncio.Event()
        self._waking: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._jobs: dict[Job, PooledJob] = {}
        self._names: dict[Run, str] = {}
        self._timer: asyncio.TimerHandle | None = None
        replicas.watch(self._list)

    async def arithmetic(self) -> str:
        """That of the replicas, once there is one. See `deployments.stages.denoise.Denoise`."""
        while not self._arithmetic:
            self._wake()
            self._joined.clear()
            await self._joined.wait()
        return next(iter(self._arithmetic.values()))

    def job(self, conditioning: Any, priority: int, traceparent: str | None = None) -> PooledJob:
        """A new job, to be closed at its end. priority: a lower one comes first."""
        job = PooledJob(self, conditioning, priority, traceparent)
        self._jobs[job.job] = job
        return job

    def submit(self, job: PooledJob, units: Sequence[Unit]) -> None:
        """These units of the job are to run."""
        if not job.closed:
            job.width = max(job.width, len(units))
            job.asked_at = self._clock()
            for place, ticket in enumerate(self.scheduler.submit(job.job, units)):
                job.places[ticket] = place
            self._pump()

    def close(self, job: PooledJob, reason: Exception) -> None:
        """Ends a job. Its thread, if it still waits for units, gets the reason as an error."""
        if job.closed:
            return
        job.closed = True
        self.scheduler.drop(job.job)
        del self._jobs[job.job]
        job.places.clear()
        job.answers.put((-1, reason))
        self._forget(job)
        self._pump()

    # Replicas.

    def _list(self, names: frozenset[str]) -> None:
        came, went, self._listed = names - self._listed, self._listed - names, names
        for name in went:
            self._leave(name)
        for name in came:
            self._spawn(self._join(name))
        self._pump()

    def _leave(self, name: str) -> None:
        self._arithmetic.pop(name, None)
        self.scheduler.leave(name)

    async def _join(self, name: str) -> None:
        while name in self._listed:
            try:
                arithmetic = await asyncio.wait_for(self._replicas.arithmetic(name), ANSWER_S)
            except Exception:
                logger.warning("a replica does not answer", exc_info=True, extra={"action": "replica_silent", "replica": name})
                await asyncio.sleep(AGAIN_S)
                continue
            if name in self._listed:
                self._arithmetic[name] = arithmetic
                self._joined.set()
                self.scheduler.join(name)
                self._warn_if_mixed()
                self._pump()
            return

    def _warn_if_mixed(self) -> None:
        if len(set(self._arithmetic.values())) > 1:
            logger.warning(
                "replicas that denoise differ in GPU, libraries or engines: the bits of a job depend on who ran it",
                extra={"action": "arithmetic_mixed", "replicas": dict(self._arithmetic)},
            )

    def _wake(self) -> None:
        """Asks for a replica where there is none."""
        if not self._listed and (self._waking is None or self._waking.done()):
            self._waking = self._spawn(self._woken())

    async def _woken(self) -> None:
        while not self._listed:
            with suppress(ReelrayError):
                await self._replicas.wake()
            await asyncio.sleep(AGAIN_S)

    # Units.

    def _pump(self) -> None:
        """Does what the scheduler orders now, and looks again when time alone will change that."""
        orders = self.scheduler.orders()
        for run in orders.start:
            self._names[run] = uuid4().hex
            if (reason := _again(run)) is not None:
                metrics.UNITS_AGAIN.record(endpoint=self.endpoint, reason=reason)
            self._spawn(self._run(run, self._jobs[run.ticket.job]))
        stops: dict[str, list[str]] = {}
        for run in orders.stop:
            if run in self._names:
                stops.setdefault(run.replica, []).append(self._names[run])
        for replica, names in stops.items():
            self._spawn(self._stop(replica, names))
        if self._jobs:
            self._wake()
        if self._timer is not None:
            self._timer.cancel()
        due_s = self.scheduler.due_in_s()
        self._timer = None if due_s is None else self._loop.call_later(due_s, self._pump)

    async def _run(self, run: Run, job: PooledJob) -> None:
        ticket, output, error = run.ticket, None, None
        how: Any = "lost"
        job.begun.set()
        job.runs[run.replica] += 1
        call = UnitCall(self._names[run], job.name, ticket.unit, job.traceparent)
        try:
            async with aclosing(self._replicas.run(run.replica, call, job.conditioning)) as answers:
                async for item in answers:
                    if isinstance(item, UnitOutput):
                        output, how = item, "answered"
                    elif ticket in job.places:
                        if isinstance(item, Checkpoint):
                            ticket.unit = ticket.unit.resumed(item)
                        job.answers.put((job.places[ticket], item))
        except Cancelled:
            how = "stopped"
        except RunnerDisconnected:
            how = "lost"
        except Exception as exc:
            how, error = "stopped", exc if isinstance(exc, ReelrayError) else RunnerFailed()
            logger.warning("a unit failed", exc_info=exc, extra={"action": "unit_failed", "replica": run.replica})
        self._ended(run, job, how, output, error)

    def _ended(self, run: Run, job: PooledJob, how: Any, output: UnitOutput | None, error: Exception | None) -> None:
        ticket = run.ticket
        if how == "lost":
            self._lost(run)
        del self._names[run]
        # by the replica's own clock: here, a unit that waits there behind another sampler's seems to work
        took_s = output.seconds if output is not None and output.seconds else run.took_s(self._clock())
        counted = output if self.scheduler.ended(run, how) else None
        job.worked(run.replica, took_s, answered=counted is not None)
        if counted is not None:
            metrics.UNIT.record(took_s, endpoint=self.endpoint)
            metrics.UNIT_WAIT.record(self._clock() - took_s - job.asked_at, endpoint=self.endpoint)
            job.answers.put((job.places.pop(ticket), counted))
        elif ticket in job.places and (error is not None or ticket.losses >= MOST_LOSSES):
            self.close(job, error or RunnerDisconnected())
        job.runs[run.replica] -= 1
        if job.closed:
            self._forget(job)
        self._pump()

    def _lost(self, run: Run) -> None:
        """A replica has died, or cannot be reached."""
        logger.warning("a unit was lost with its replica", extra={"action": "unit_lost", "replica": run.replica})
        known = run.replica in self._arithmetic
        self._leave(run.replica)
        if known and run.replica in self._listed:
            self._spawn(self._rejoin(run.replica))

    async def _rejoin(self, name: str) -> None:
        await asyncio.sleep(AGAIN_S)
        await self._join(name)

    async def _stop(self, replica: str, names: list[str]) -> None:
        with suppress(ReelrayError):
            await self._replicas.stop(replica, names)

    def _forget(self, job: PooledJob) -> None:
        """Tells replicas that have nothing more to do for a job which has ended."""

        async def forget(replica: str) -> None:
            with suppress(ReelrayError):
                await self._replicas.forget(replica, job.name)

        for replica in [replica for replica, runs in job.runs.items() if not runs]:
            del job.runs[replica]
            if replica in self._listed:
                self._spawn(forget(replica))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work, context=self._context.copy())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _again(run: Run) -> str | None:
    """Why a unit goes to a replica although it has been sent to one before; None: it has not."""
    others = [each for each in run.ticket.runs if each is not run]
    if others:
        return "moved" if all(each.stopping for each in others) else "straggler"
    return "lost" if run.ticket.losses else None
