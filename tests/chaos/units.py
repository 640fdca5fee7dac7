"""Stages whose units of work sleep. Each has several replicas with one call at a time, in threads as in Serve's wrappers."""

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

from deployments.stages.progress import Stage
from deployments.stages.protocol import CheckpointRef, Done, OnNote, Started, Stream
from deployments.stages.threaded import InThread
from engines.errors import Cancelled
from engines.spec import Clip, OnProgress, Progress, ShouldStop
from tests.fakes import done_of

UNITS = {"preprocess": 2, "denoise": 4, "decode": 2}


@dataclass(frozen=True)
class Unit:
    """number: of the unit within its stage, from 0. began: in seconds of `time.monotonic`."""

    stage: str
    number: int
    began: float


class UnitStages:
    """unit_s: a unit's shortest and longest sleep. on_unit: called as each unit begins, in its thread, with the job's seed.

    begun: a job's seed -> its units. working: threads at work now.
    """

    def __init__(self, replicas: int, unit_s: tuple[float, float], on_unit: Callable[[int, Unit], None]):
        self._turns = {stage: [asyncio.Lock() for _ in range(replicas)] for stage in UNITS}
        self._next = count()
        self._unit_s = unit_s
        self.on_unit = on_unit
        self.begun: defaultdict[int, list[Unit]] = defaultdict(list)
        self.working: set[tuple[int, str]] = set()

    @property
    def turns_taken(self) -> int:
        """How many replicas are working on a call."""
        return sum(turn.locked() for turns in self._turns.values() for turn in turns)

    async def preprocess(self, job_input: dict[str, Any], on_note: OnNote, *, alone: bool = False) -> Done[Any]:
        return await done_of(self._run("preprocess", job_input), on_note)

    def watch_replicas(self, changed: Callable[[int], None]) -> None:
        changed(len(self._turns["denoise"]))

    async def denoise(self, conditioning: Any, checkpoint: CheckpointRef, on_note: OnNote, *, priority: int = 0) -> Done[Any]:
        return await done_of(self._run("denoise", conditioning), on_note)

    async def saved(self, checkpoint: CheckpointRef, on_note: OnNote) -> None:
        """These stages keep nothing."""

    async def decode(self, latents: Any, on_note: OnNote) -> Done[Clip]:
        done = await done_of(self._run("decode", latents), on_note)
        return Done(Clip(b"a clip", 1, 64, 64, 8, latents["seed"]), done.seconds)

    async def _run(self, stage: Stage, job: dict[str, Any]) -> Stream[dict[str, Any]]:
        def work(tell: OnProgress, should_stop: ShouldStop) -> dict[str, Any]:
            self.working.add((job["seed"], stage))
            try:
                for number in range(UNITS[stage]):
                    if should_stop():
                        raise Cancelled
                    unit = Unit(stage, number, time.monotonic())
                    self.begun[job["seed"]].append(unit)
                    self.on_unit(job["seed"], unit)
                    time.sleep(random.uniform(*self._unit_s))
                    tell(Progress("step", number + 1, UNITS[stage]))
                return job
            finally:
                self.working.discard((job["seed"], stage))

        turns = self._turns[stage]
        async with turns[next(self._next) % len(turns)]:
            yield Started()
            async with InThread(stage, work) as working:
                async for note in working:
                    yield note
        yield Done(working.product, working.seconds)
