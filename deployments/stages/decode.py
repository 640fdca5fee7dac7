"""Serve's wrapper of a model's decoding.

A replica accepts two calls and works on one at a time, as in `denoise.py`. Here the reason is memory: a VAE's pass over a chunk
of frames takes gigabytes at real sizes, and two at once on one device would not finish sooner than one after the other.
"""

import asyncio
from typing import Any

from deployments.stages.protocol import Done, Started, Stream
from deployments.stages.threaded import InThread
from engines.checkpoints.provenance import options_of, weights_of
from engines.registry import build_stage
from engines.spec import Clip, Latents, OnProgress, ShouldStop
from engines.temporary import delete_left_folders


class Decode:
    """One replica. config: the model's."""

    def __init__(self, model: str, config: Any):
        delete_left_folders()
        self.stage = build_stage(model, "decode", config)
        self.turn = asyncio.Lock()
        self.on_gpu = config.on_gpu
        # a checkpoint is used under the same weights and settings only, so they are those of the latents
        self.receipt = {"weights": weights_of(config), "options": options_of(config)}

    async def run(self, latents: Latents) -> Stream[Clip]:
        """Notes of its progress, then the encoded clip; raw frames stay in this process.

        If cancelled, it returns when the running VAE call has ended.
        """

        def decode(tell: OnProgress, should_stop: ShouldStop) -> Clip:
            return self.stage.decode(latents, on_progress=tell, should_stop=should_stop)

        async with self.turn:
            yield Started()
            async with InThread("decode", decode) as work:
                async for note in work:
                    yield note
        yield Done(work.product, work.seconds, work.seconds * self.on_gpu, self.receipt)
