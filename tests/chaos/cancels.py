"""Cancels jobs at random moments and checks for leaks: in the queue, in every unit of every stage, at the end, twice, after it.

    python -m tests.chaos.cancels [--jobs 10000] [--seed 1] [--save]

Ingress (a gateway with two workers, called over HTTP), store, dispatcher and the stages' threads are the product's. A unit of
work, for example a UNet call, is a sleep. A cancel's time runs from the request to its answer, beside the machine's other load.
"""

import argparse
import asyncio
import random
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from uuid import UUID

import asyncpg
import httpx
from rich.table import Table

from deployments.dispatch.dispatcher import Dispatcher
from deployments.files.file_store import FileStore
from deployments.hosting.embedded_postgres import database_url
from deployments.jobs.database import migrate
from deployments.jobs.job import Job, JobState
from deployments.jobs.store import JobStore
from deployments.settings import QueueSettings, RetentionSettings
from tests.chaos.units import UNITS, Unit, UnitStages
from tests.conftest import embedded
from tests.load.report import Report, percentile, table
from tests.patience import PATIENCE_S
from tests.wire.hosting import hosted

ENDPOINT = "fal-ai/animatediff-sparsectrl-lcm"
ROOM = 12
CALLERS = 30
"""More than `ROOM`, so that some jobs are cancelled while they wait."""

UNIT_S = (0.02, 0.08)
MOMENTS = ("in the queue", "at random", *(f"in {stage}" for stage in UNITS), "at the end", "twice", "after the end", "never")


@dataclass
class Cancels:
    """Callers and what they saw. stages: their units signal a caller when to cancel."""

    url: str
    store: JobStore
    random: random.Random
    faults: list[str] = field(default_factory=list)
    acknowledged_s: list[float] = field(default_factory=list)
    units_after: list[int] = field(default_factory=list)
    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    ids: list[str] = field(default_factory=list)
    stages: UnitStages = field(init=False)

    def __post_init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._awaited: dict[int, tuple[str, int, asyncio.Event]] = {}
        self.stages = UnitStages(ROOM, UNIT_S, self._on_unit)

    def _on_unit(self, seed: int, unit: Unit) -> None:
        awaited = self._awaited.get(seed)
        if awaited is not None and awaited[:2] == (unit.stage, unit.number):
            self._loop.call_soon_threadsafe(awaited[2].set)

    async def run(self, jobs: int) -> None:
        """Runs every job from its submission to its end."""
        seeds = iter(range(jobs))
        limits = httpx.Limits(max_connections=2 * CALLERS)
        async with httpx.AsyncClient(base_url=self.url, trust_env=False, timeout=PATIENCE_S, limits=limits) as http:

            async def call() -> None:
                for seed in seeds:
                    await self._one(http, seed, self.random.choice(MOMENTS))

            await asyncio.gather(*(call() for _ in range(CALLERS)))

    async def _one(self, http: httpx.AsyncClient, seed: int, moment: str) -> None:
        stage = moment.removeprefix("in ") if moment.removeprefix("in ") in UNITS else "decode"
        number = UNITS[stage] - 1 if moment == "at the end" else self.random.randrange(UNITS[stage])
        reached = asyncio.Event()
        self._awaited[seed] = (stage, number, reached)
        request_id = await self._submit(http, seed)
        job_id = UUID(request_id)
        if moment == "at random":
            await asyncio.sleep(self.random.uniform(0, 0.8))
        elif moment in ("never", "after the end"):
            await self._end(job_id)
        elif moment != "in the queue":
            async with asyncio.timeout(PATIENCE_S):
                await reached.wait()
            await asyncio.sleep(self.random.uniform(0, 1.5 * UNIT_S[1]) if moment == "at the end" else 0)
        answers = []
        if moment != "never":
            answers = await asyncio.gather(*(self._cancel(http, request_id) for _ in range(2 if moment == "twice" else 1)))
        acknowledged = time.monotonic()
        job = await self._end(job_id)
        self._judge(seed, moment, job, answers)
        if job.state is JobState.CANCELLED or (job.state is JobState.SUCCEEDED and "CANCELLATION_REQUESTED" in answers):
            self.units_after.append(sum(unit.began > acknowledged for unit in self.stages.begun.get(seed, ())))
        self.ends[moment, job.state] += 1
        self.stages.begun.pop(seed, None)
        del self._awaited[seed]

    async def _submit(self, http: httpx.AsyncClient, seed: int) -> str:
        answer = await http.post(f"/queue/{ENDPOINT}", json={"prompt": "a", "seed": seed})
        request_id: str = answer.json()["request_id"]
        self.ids.append(request_id)
        return request_id

    async def _cancel(self, http: httpx.AsyncClient, request_id: str) -> str:
        began = time.monotonic()
        answer = await http.put(f"/queue/{ENDPOINT}/requests/{request_id}/cancel")
        self.acknowledged_s.append(time.monotonic() - began)
        status: str = answer.json()["status"]
        return status

    async def _end(self, job_id: UUID) -> Job:
        async with asyncio.timeout(PATIENCE_S), self.store.watch(job_id) as changes:
            while (job := await self.store.get(job_id)) is None or not job.state.ended:
                await changes.changed(5)
        return job

    def _judge(self, seed: int, moment: str, job: Job, answers: list[str]) -> None:
        allowed = {JobState.CANCELLED}
        if moment in ("never", "after the end"):
            allowed = {JobState.SUCCEEDED}
        elif moment not in ("in the queue", "in preprocess"):
            allowed = {JobState.CANCELLED, JobState.SUCCEEDED}  # it may end before the cancel arrives
        if job.state not in allowed:
            self.faults.append(f"job {seed}, cancelled {moment}, is {job.state}")
        if moment == "after the end" and answers != ["ALREADY_COMPLETED"]:
            self.faults.append(f"job {seed} had ended, and its cancel was answered {answers}")
        if job.state is JobState.CANCELLED and "CANCELLATION_REQUESTED" not in answers:
            self.faults.append(f"job {seed} was cancelled, and its cancel was answered {answers}")

    def left_behind(self, store: JobStore) -> list[str]:
        """What should be gone when no job is left. store: the dispatcher's."""
        listening = {subject for subject in store.database._listener._subscribers if subject != "work"}
        kinds = {
            "threads at work": self.stages.working,
            "replicas taken": self.stages.turns_taken,
            "subscriptions": listening,
        }
        return [f"left behind: {what}: {left}" for what, left in kinds.items() if left]

    async def fill_the_room(self) -> int:
        """How many jobs run at once when more wait: `ROOM`, unless a cancelled job still holds a place. All must succeed."""
        running = set[int]()
        full, released = asyncio.Event(), threading.Event()

        def hold(seed: int, unit: Unit) -> None:
            running.add(seed)
            if len(running) >= ROOM:
                self._loop.call_soon_threadsafe(full.set)
            released.wait(PATIENCE_S)

        self.stages.on_unit = hold
        async with httpx.AsyncClient(base_url=self.url, trust_env=False, timeout=PATIENCE_S) as http:
            ids = [await self._submit(http, 1_000_000 + i) for i in range(2 * ROOM)]
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                await full.wait()
        most = len(running)
        released.set()
        for request_id in ids:
            job = await self._end(UUID(request_id))
            if job.state is not JobState.SUCCEEDED:
                self.faults.append(f"after all the cancels a job is {job.state}")
        return most


async def unleash(database: str, files: FileStore, jobs: int, seed: int) -> tuple[list[str], Table]:
    """The promises that were broken, and the figures. database: the URL of a migrated, empty database."""
    loop = asyncio.get_running_loop()
    callers_store, store = await JobStore.open(database), await JobStore.open(database)
    tasks_before, threads_before = len(asyncio.all_tasks()), set(threading.enumerate())
    with hosted("gateway", database) as door:
        cancels = Cancels(door.url, callers_store, random.Random(seed))
        queue = QueueSettings(max_in_flight=ROOM)
        dispatching = loop.create_task(Dispatcher(store, files, {ENDPOINT: cancels.stages}, queue, RetentionSettings()).run())
        began = time.monotonic()
        await cancels.run(jobs)
        took_s = time.monotonic() - began
        faults = cancels.faults
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):  # what was closed needs a moment to be cleaned up
                while cancels.left_behind(store):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        faults += cancels.left_behind(store)
        room = await cancels.fill_the_room()
        if room != ROOM:
            faults.append(f"of {ROOM} places {room} are left")
        dispatching.cancel()
        await asyncio.wait([dispatching])
    await asyncio.sleep(0.1)
    if (tasks := len(asyncio.all_tasks())) > tasks_before:
        faults.append(f"left behind: {tasks - tasks_before} tasks")
    new = set(threading.enumerate()) - threads_before
    if threads := [thread.name for thread in new if thread.name.startswith("ThreadPoolExecutor")]:
        faults.append(f"left behind: threads of stages: {threads}")
    faults += await _history(database, len(cancels.ids))
    await store.close()
    await callers_store.close()
    return faults, _figures(cancels, jobs, took_s)


async def _history(database: str, jobs: int) -> list[str]:
    """What is wrong with the states that the jobs went through."""
    connection = await asyncpg.connect(database)
    try:
        states = dict(await connection.fetch("SELECT state, count(*) FROM jobs GROUP BY 1"))
        ends = await connection.fetch(
            "SELECT job_id, count(*) FROM job_events WHERE state IN ('succeeded', 'failed', 'cancelled')"
            " GROUP BY job_id HAVING count(*) > 1"
        )
    finally:
        await connection.close()
    faults = [f"{count} jobs are {state}" for state, count in states.items() if state not in ("succeeded", "cancelled")]
    faults += [f"{sum(states.values())} jobs instead of {jobs}"] if sum(states.values()) != jobs else []
    return faults + [f"job {row['job_id']} ended {row['count']} times" for row in ends]


def _figures(cancels: Cancels, jobs: int, took_s: float) -> Table:
    shown = table(f"{jobs:,} jobs, {ROOM} at once, units of {UNIT_S[0] * 1000:g} to {UNIT_S[1] * 1000:g} ms", "what", "count")
    for (moment, state), count in sorted(cancels.ends.items()):
        shown.add_row(f"cancelled {moment}: {state}", f"{count:,}")
    acknowledged, after = cancels.acknowledged_s, cancels.units_after
    shown.add_row("cancels", f"{len(acknowledged):,}")
    for percent in (50, 99):
        shown.add_row(f"acknowledged in ms, p{percent}", f"{percentile(acknowledged, percent) * 1000:.1f}")
    for number, count in sorted(Counter(after).items()):
        shown.add_row(f"with {number} units begun after the answer", f"{count:,}")
    shown.add_row("seconds", f"{took_s:.0f}")
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="keep the figures")
    asked = parser.parse_args()
    report = Report("cancels", "Cancels at random moments", __doc__, "`make chaos`")
    with embedded() as settings:
        files = FileStore(settings.files_url)
        url = database_url(settings)
        asyncio.run(migrate(url))
        faults, shown = asyncio.run(unleash(url, files, asked.jobs, asked.seed))
    report.add(shown)
    report.add("Targets: acknowledged within 50 ms, at most one unit begun after.")
    return report.conclude(faults, save=asked.save)


if __name__ == "__main__":
    sys.exit(main())
