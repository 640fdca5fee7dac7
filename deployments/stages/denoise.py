"""Serve's wrapper of a model's denoising.

A replica accepts two calls and works on one at a time, so that the next one's conditioning is already here when its turn comes.
A call's progress is stored as a checkpoint, so that a later attempt at the job need not repeat it.
"""

import asyncio
from typing import Any

from deployments.files.checkpoints import Checkpoints, Saving
from deployments.stages.protocol import CheckpointRef, Done, Note, Started, Stream
from deployments.stages.threaded import InThread
from engines.registry import build_stage
from engines.spec import Conditioning, Latents, OnProgress, ShouldStop


class Denoise:
    """One replica. config: the model's. files_url: of the file store. checkpoint_s: seconds between two checkpoints."""

    def __init__(self, model: str, config: Any, files_url: str, checkpoint_s: float):
        self.stage = build_stage(model, "denoise", config)
        self.checkpoints = Checkpoints(files_url, config, lambda: self.stage.engines)
        self.checkpoint_s = checkpoint_s
        self.turn = asyncio.Lock()

    async def run(self, conditioning: Conditioning, checkpoint: CheckpointRef) -> Stream[Latents]:
        """Notes of its progress, then the latents, which by then are stored as the job's checkpoint.

        If cancelled, it gives up its turn when the running UNet call has ended, and returns when the last step is stored.
        """
        resume = await self.checkpoints.step(checkpoint.name, conditioning) if checkpoint.used else None

        def sample(tell: OnProgress, should_stop: ShouldStop) -> Latents:
            return self.stage.sample(conditioning, resume=resume, on_step=saving.offer, on_progress=tell, should_stop=should_stop)

        async with Saving(self.checkpoints, checkpoint.name, conditioning, self.checkpoint_s) as saving:
            async with self.turn:
                yield Started()
                if resume is not None:
                    yield Note(f"resumed at step {resume.step}/{resume.steps}")
                saving.begin()
                async with InThread("denoise", sample) as work:
                    async for note in work:
                        yield note
            await saving.finish(work.product)  # after its turn, so that the next call works meanwhile
        yield Done(work.product, work.seconds)
