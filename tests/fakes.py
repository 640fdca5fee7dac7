"""Stages without Ray: Serve's wrappers called in this process, and stages that a test controls."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, NoReturn, TypeVar

from deployments.schemas.endpoint import ENDPOINTS
from deployments.settings import Settings
from deployments.stages.decode import Decode
from deployments.stages.denoise import Denoise
from deployments.stages.preprocess import Preprocess
from deployments.stages.protocol import CheckpointRef, Done, Note, OnNote, Stream, UnitCall
from deployments.stages.sampler import Sampler
from engines.errors import Cancelled, RunnerDisconnected
from engines.spec import Clip, OnProgress, Progress, ShouldStop
from engines.units import Report, UnitOutput

ENDPOINT = "fal-ai/animatediff-sparsectrl-lcm"
T = TypeVar("T")
CLIP = Clip(b"an mp4", 16, 64, 64, 8, 42)


class LocalReplicas:
    """Denoise replicas in this process, which may come, be killed and be drained. on_unit: called before each unit is run."""

    def __init__(self, *replicas: Denoise):
        self.alive = {f"replica-{n}": replica for n, replica in enumerate(replicas)}
        self.told: list[Callable[[frozenset[str]], None]] = []
        self.calls: dict[str, set[asyncio.Task[Any]]] = {}
        self.killed: set[asyncio.Task[Any]] = set()
        self.ran: list[tuple[str, UnitCall]] = []
        self.begun = 0
        self.fetched: Counter[str] = Counter()
        self.wanted = False
        self.drained: set[str] = set()
        self.on_unit: Callable[[str, UnitCall], None] = lambda *_: None

    def watch(self, changed: Callable[[frozenset[str]], None]) -> None:
        self.told.append(changed)
        changed(frozenset(self.alive))

    def _tell(self) -> None:
        for tell in self.told:
            tell(frozenset(self.alive) - self.drained)

    async def wake(self) -> None:
        self.wanted = not self.alive
        while not self.alive:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    def add(self, name: str, replica: Denoise) -> None:
        self.alive[name] = replica
        self._tell()

    def kill(self, name: str) -> None:
        """As Serve: its calls fail at once, and a moment later it is no longer listed."""
        for call in self.calls.pop(name, set()):
            self.killed.add(call)
            call.cancel()
        del self.alive[name]
        asyncio.get_running_loop().call_later(0.02, self._tell)

    def drain(self, name: str) -> None:
        """As Serve: it is no longer listed, but ends what it works on."""
        self.drained.add(name)
        self._tell()

    async def arithmetic(self, replica: str) -> str:
        return self._of(replica).arithmetic()

    def _of(self, replica: str) -> Denoise:
        if replica not in self.alive:
            raise RunnerDisconnected
        return self.alive[replica]

    async def run(self, replica: str, call: UnitCall, conditioning: Any) -> AsyncGenerator[Report | UnitOutput, None]:
        async def fetch() -> Any:
            self.fetched[replica] += 1
            return conditioning

        at, task = self._of(replica), asyncio.current_task()
        assert task is not None
        self.begun += 1
        self.on_unit(replica, call)
        self.calls.setdefault(replica, set()).add(task)
        try:
            async with aclosing(at.run(call, fetch)) as answers:
                async for item in answers:
                    if isinstance(item, UnitOutput):
                        self.ran.append((replica, call))
                    yield item
        except asyncio.CancelledError:
            if task in self.killed:
                task.uncancel()
                raise RunnerDisconnected from None
            raise
        finally:
            self.calls.get(replica, set()).discard(task)

    async def stop(self, replica: str, runs: Sequence[str]) -> None:
        self._of(replica).stop(runs)

    async def forget(self, replica: str, job: str) -> None:
        self._of(replica).forget(job)


class LocalStages:
    """The real wrappers and the real model, all in one process, with as many denoise replicas as asked for."""

    def __init__(self, settings: Settings, endpoint_id: str = ENDPOINT, replicas: int = 1):
        endpoint = ENDPOINTS[endpoint_id]
        config = settings.model_configs()[endpoint.model]
        self.preprocess_replica = Preprocess(endpoint, config, settings.fetch, settings.files_url)
        self.denoise_replica, *others = [Denoise(endpoint.model, config) for _ in range(replicas)]
        self.replicas = LocalReplicas(self.denoise_replica, *others)
        self.new_sampler = lambda: Sampler(endpoint.model, config, settings.files_url, settings.queue.checkpoint_s, self.replicas)
        self.sampler: Sampler | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self.decode_replica = Decode(endpoint.model, config)

    async def preprocess(self, job_input: dict[str, Any], on_note: OnNote, *, alone: bool = False) -> Done[Any]:
        return await done_of(self.preprocess_replica.run(job_input, alone), on_note)

    async def denoise(self, conditioning: Any, checkpoint: CheckpointRef, on_note: OnNote, *, priority: int = 0) -> Done[Any]:
        if self.sampler is None or self.loop is not asyncio.get_running_loop():
            for replica in self.replicas.alive.values():  # what an event loop that has ended left there
                replica._kept.clear()
            self.sampler, self.loop = self.new_sampler(), asyncio.get_running_loop()
        return await done_of(self.sampler.run(conditioning, conditioning, checkpoint, priority), on_note)

    async def saved(self, checkpoint: CheckpointRef, on_note: OnNote) -> Any | None:
        return (await done_of(self.preprocess_replica.saved(checkpoint), on_note)).product

    async def decode(self, latents: Any, on_note: OnNote) -> Done[Clip]:
        return await done_of(self.decode_replica.run(latents), on_note)

    def watch_replicas(self, changed: Callable[[int], None]) -> None:
        changed(len(self.replicas.alive))


async def done_of(stream: Stream[T], on_note: OnNote) -> Done[T]:
    try:
        async for item in stream:
            if isinstance(item, Done):
                return item
            await on_note(item)
    finally:
        await stream.aclose()  # as Serve does when the caller cancels
    raise AssertionError("the stream ended without `Done`")


class ScriptedStages:
    """Denoising calls `act`; the other stages do nothing. running: calls of `act` now. peak: the most at once."""

    def __init__(self, act: Callable[[dict[str, Any]], Awaitable[None]]):
        self.act = act
        self.running = self.peak = self.calls = 0

    async def preprocess(self, job_input: dict[str, Any], on_note: OnNote, *, alone: bool = False) -> Done[Any]:
        return Done(job_input, 0.25)

    async def saved(self, checkpoint: CheckpointRef, on_note: OnNote) -> Any | None:
        return None

    def watch_replicas(self, changed: Callable[[int], None]) -> None:
        changed(100)  # so that `max_in_flight` alone bounds the jobs

    async def denoise(self, conditioning: Any, checkpoint: CheckpointRef, on_note: OnNote, *, priority: int = 0) -> Done[Any]:
        self.calls += 1
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            await on_note(Note("step 1/1"))
            await self.act(conditioning)
        finally:
            self.running -= 1
        return Done(conditioning, 0.5)

    async def decode(self, latents: Any, on_note: OnNote) -> Done[Clip]:
        return Done(CLIP, 0.125)


def held_after(replica: Any, step: int) -> None:
    """The replica's denoising then works up to this step, and goes on only once it is to stop."""
    begin = replica.stage.begin

    def begun(conditioning: Any) -> Any:
        request = begin(conditioning)
        run = request.run

        def held(unit: Any, tell: Callable[[Report], None], should_stop: ShouldStop) -> UnitOutput:
            def told(report: Report) -> None:
                tell(report)
                wait(isinstance(report, Progress) and report.done >= step)

            def wait(now: bool) -> None:
                while now and not should_stop():
                    time.sleep(0.01)

            wait(getattr(unit, "step", -1) >= step)
            output: UnitOutput = run(unit, told, should_stop)
            return output

        request.run = held
        return request

    replica.stage.begin = begun


class EndlessStage:
    """Preprocesses or decodes at 0.01 s per frame until it is stopped. running: calls in progress."""

    def __init__(self) -> None:
        self.running = 0

    def _work(self, _: Any, *, on_progress: OnProgress, should_stop: ShouldStop) -> NoReturn:
        self.running += 1
        frames = 0
        while not should_stop():
            frames += 1
            on_progress(Progress("frame", frames, 1_000_000))
            time.sleep(0.01)
        self.running -= 1
        raise Cancelled

    encode = decode = _work


async def for_ever(_: dict[str, Any]) -> None:
    await asyncio.Event().wait()
