"""Serve's wrapper of a model's denoising.

A replica accepts two calls and works on one at a time, so that the next one's conditioning is already here when its turn comes.
A call's progress is stored as a checkpoint, so that a later attempt at the job need not repeat it.
"""

import asyncio
import logging
from typing import Any

from deployments.files.checkpoints import Checkpoints, Saving
from deployments.stages.protocol import CheckpointRef, Done, Note, Started, Stream
from deployments.stages.threaded import InThread
from engines.registry import build_stage
from engines.spec import Conditioning, Latents, OnProgress, ShouldStop

logger = logging.getLogger(__name__)


class Denoise:
    """One replica. config: the model's. files_url: of the file store. checkpoint_s: seconds between two checkpoints."""

    def __init__(self, model: str, config: Any, files_url: str, checkpoint_s: float):
        self.stage = build_stage(model, "denoise", config)
        self.checkpoints = Checkpoints(files_url, config, lambda: self.stage.engines)
        self.checkpoint_s = checkpoint_s
        self.turn = asyncio.Lock()

    async def run(self, conditioning: Conditioning, checkpoint: CheckpointRef) -> Stream[Latents]:
        """Notes of its progress, then the latents, which by then are stored as the job's checkpoint.

        A step of other engines than this replica's is not resumed from. Where engines were mixed even so, because one failed at
        some calls of this attempt or of the one that it resumes, a WARN says it: the result is no longer that of one arithmetic.

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
            if (mixed := _mixed(work.product.engine)) is not None:
                logger.warning(mixed, extra={"action": "engines_mixed", "file": checkpoint.name})
                yield Note(mixed, "WARN")
            await saving.finish(work.product)  # after its turn, so that the next call works meanwhile
        yield Done(work.product, work.seconds)


def _mixed(engine: str) -> str | None:
    """A line for the log if several engines ran a job's steps. engine: what ran them, see `Latents`."""
    ran = engine.split("+")
    return f"steps were run by {' and '.join(ran)}: the same request may give other bits another time" if len(ran) > 1 else None
