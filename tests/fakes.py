"""Stages without Ray: Serve's wrappers called in this process, and stages that a test controls."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeVar

from deployments.schemas.endpoint import ENDPOINTS
from deployments.settings import Settings
from deployments.stages.decode import Decode
from deployments.stages.denoise import Denoise
from deployments.stages.preprocess import Preprocess
from deployments.stages.protocol import CheckpointRef, Done, Note, OnNote, Stream
from engines.errors import Cancelled
from engines.spec import Checkpoint, Clip, OnProgress, OnStep, Progress, ShouldStop

ENDPOINT = "fal-ai/animatediff-sparsectrl-lcm"
T = TypeVar("T")
CLIP = Clip(b"an mp4", 16, 64, 64, 8, 42)


class LocalStages:
    """The real wrappers and the real model, all in one process."""

    def __init__(self, settings: Settings, endpoint_id: str = ENDPOINT):
        endpoint = ENDPOINTS[endpoint_id]
        config = settings.model_configs()[endpoint.model]
        self.preprocess_replica = Preprocess(endpoint, config, settings.fetch, settings.files_url)
        self.denoise_replica = Denoise(endpoint.model, config, settings.files_url, settings.queue.checkpoint_s)
        self.decode_replica = Decode(endpoint.model, config)

    async def preprocess(self, job_input: dict[str, Any], on_note: OnNote, *, alone: bool = False) -> Done[Any]:
        return await done_of(self.preprocess_replica.run(job_input, alone), on_note)

    async def denoise(self, conditioning: Any, checkpoint: CheckpointRef, on_note: OnNote) -> Done[Any]:
        return await done_of(self.denoise_replica.run(conditioning, checkpoint), on_note)

    async def saved(self, checkpoint: CheckpointRef, on_note: OnNote) -> Any | None:
        return (await done_of(self.preprocess_replica.saved(checkpoint), on_note)).product

    async def decode(self, latents: Any, on_note: OnNote) -> Done[Clip]:
        return await done_of(self.decode_replica.run(latents), on_note)


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

    async def denoise(self, conditioning: Any, checkpoint: CheckpointRef, on_note: OnNote) -> Done[Any]:
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
    sample = replica.stage.sample

    def held(*args: Any, on_step: OnStep, should_stop: ShouldStop, **options: Any) -> Any:
        def offer(checkpoint: Checkpoint) -> None:
            on_step(checkpoint)
            while checkpoint.step >= step and not should_stop():
                time.sleep(0.01)

        return sample(*args, on_step=offer, should_stop=should_stop, **options)

    replica.stage.sample = held


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
