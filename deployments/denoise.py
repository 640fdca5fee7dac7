"""Serve's wrapper of a model's denoising.

A replica takes two calls and works on one, so that the next one's conditioning is already here when its turn comes.
"""

import asyncio
from typing import Any

from deployments.stages import TURN, Done, Stream
from deployments.threaded import InThread
from engines.registry import build_stage
from engines.spec import Conditioning, Latents, OnProgress, ShouldStop


class Denoise:
    """One replica. config: of the model."""

    def __init__(self, model: str, config: Any):
        self.stage = build_stage(model, "denoise", config)
        self.turn = asyncio.Lock()

    async def run(self, conditioning: Conditioning) -> Stream:
        """Notes of its progress, then the latents. Cancelled, it returns once the running UNet call has ended."""

        def sample(tell: OnProgress, should_stop: ShouldStop) -> Latents:
            return self.stage.sample(conditioning, on_progress=tell, should_stop=should_stop)

        async with self.turn:
            yield TURN
            async with InThread("denoise", sample) as work:
                async for note in work:
                    yield note
        yield Done(work.seconds)
        yield work.product
