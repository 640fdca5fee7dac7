"""Cancels at random moments: in the queue, in every unit of every stage, at the very end, twice, after the end. What leaks?

    python -m tests.chaos.cancels [--jobs 10000] [--seed 1] [--save]

Door (a gateway with two workers, asked over HTTP), store, dispatcher and the stages' threads are the product's; a unit of work,
a UNet call say, is a sleep. Cancels are timed from the request to its answer, with the machine's other load.
"""

import argparse
import asyncio
import random
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import asyncpg
import httpx
from rich.table import Table

from deployments.dispatcher import Dispatcher
from deployments.jobs.job import Job, JobState
from deployments.jobs.store import JobStore
from deployments.settings import QueueSettings
from deployments.storage import FileStore
from tests.chaos.units import UNITS, Unit, UnitStages
from tests.conftest import embedded, of_database
from tests.load.report import Report, percentile, table
from tests.wire.hosting import hosted

ENDPOINT = "fal-ai/animatediff-sparsectrl-lcm"
ROOM = 12
CALLERS = 30
"""More than there is room for, so that some jobs are cancelled while they wait."""

UNIT_S = (0.02, 0.08)
END_S = 60.0
MOMENTS = ("in the queue", "at random", *(f"in {stage}" for stage in UNITS), "at the end", "twice", "after the end", "never")


@dataclass
class Cancels:
    """Callers and what they saw. stages: whose units tell them when their moment has come."""

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
        self._gate: tuple[set[int], asyncio.Event] | None = None
        self.stages = UnitStages(ROOM, UNIT_S, self._on_unit)

    def _on_unit(self, seed: int, unit: Unit) -> None:
        awaited = self._awaited.get(seed)
        if awaited is not None and awaited[:2] == (unit.stage, unit.number):
            self._loop.call_soon_threadsafe(awaited[2].set)

    async def run(self, jobs: int) -> None:
        """Every job from its submission to its end."""
        seeds = iter(range(jobs))
        limits = httpx.Limits(max_connections=2 * CALLERS)
        async with httpx.AsyncClient(base_url=self.url, trust_env=False, timeout=30, limits=limits) as http:

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
        job_id = _uuid(request_id)
        if moment == "at random":
            await asyncio.sleep(self.random.uniform(0, 0.8))
        elif moment in ("never", "after the end"):
            await self._end(job_id)
        elif moment != "in the queue":
            async with asyncio.timeout(END_S):
                await reached.wait()
            await asyncio.sleep(self.random.uniform(0, 1.5 * UNIT_S[1]) if moment == "at the end" else 0)
        answers = []
        if moment != "never":
            answers = await asyncio.gather(*(self._cancel(http, request_id) for _ in range(2 if moment == "twice" else 1)))
        acknowledged = time.monotonic()
        job = await self._end(job_id)
        self._judge(seed, moment, job, answers)
        if job.state is JobState.CANCELLED:
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

    async def _end(self, job_id: "_Id") -> Job:
        async with asyncio.timeout(END_S), self.store.watch(job_id) as changes:
            while (job := await self.store.get(job_id)) is None or not job.state.ended:
                await changes.changed(5)
        return job

    def _judge(self, seed: int, moment: str, job: Job, answers: list[str]) -> None:
        allowed = {JobState.CANCELLED}
        if moment in ("never", "after the end"):
            allowed = {JobState.SUCCEEDED}
        elif moment in ("at random", "at the end", "twice", "in decode"):
            allowed = {JobState.CANCELLED, JobState.SUCCEEDED}  # it may end before the word arrives
        if job.state not in allowed:
            self.faults.append(f"job {seed}, cancelled {moment}, is {job.state}")
        if moment == "after the end" and answers != ["ALREADY_COMPLETED"]:
            self.faults.append(f"job {seed} had ended, and its cancel was answered {answers}")
        if job.state is JobState.CANCELLED and "CANCELLATION_REQUESTED" not in answers:
            self.faults.append(f"job {seed} was cancelled, and its cancel answered {answers}")

    async def fill_the_room(self) -> int:
        """How many jobs run at once, of twice as many as there is room for; then they are cancelled."""
        running, most = set[int](), 0
        full = asyncio.Event()
        first = 1 << 40

        def on_unit(seed: int, unit: Unit) -> None:
            running.add(seed)
            if len(running) >= ROOM:
                self._loop.call_soon_threadsafe(full.set)
            released.wait()

        released = threading.Event()
        self.stages._on_unit = on_unit
        async with httpx.AsyncClient(base_url=self.url, trust_env=False, timeout=30) as http:
            ids = [await self._submit(http, first + i) for i in range(2 * ROOM)]
            try:
                async with asyncio.timeout(END_S):
                    await full.wait()
                most = len(running)
            except TimeoutError:
                most = len(running)
            finally:
                self.stages._on_unit = self._on_unit
                released.set()
            for request_id in ids:
                job = await self._end(_uuid(request_id))
                if job.state is not JobState.SUCCEEDED:
                    self.faults.append(f"a job after all the cancels is {job.state}")
        return most
