"""Serve's wrapper of a model's denoising: the step loop in a thread, its progress as a stream, and a flag that stops it.

A replica takes two calls and works on one, so that the next one's conditioning is already here when its turn comes.
"""

import asyncio
import threading
import time
from functools import partial
from typing import Any

from deployments.stages import Done, Note, Stream
from engines.registry import build_stage
from engines.spec import Checkpoint, Conditioning


class Denoise:
    """One replica. config: of the model."""

    def __init__(self, model: str, config: Any):
        self.stage = build_stage(model, "denoise", config)
        self.turn = asyncio.Lock()

    async def run(self, conditioning: Conditioning) -> Stream:
        """A note for every step, then the latents. Cancelled, it returns once the running UNet call has ended."""
        loop = asyncio.get_running_loop()
        steps: asyncio.Queue[Checkpoint | None] = asyncio.Queue()
        stop = threading.Event()

        def on_step(checkpoint: Checkpoint) -> None:
            loop.call_soon_threadsafe(steps.put_nowait, checkpoint)

        sample = partial(self.stage.sample, conditioning, on_step=on_step, should_stop=stop.is_set)
        async with self.turn:
            started = time.monotonic()
            work = loop.run_in_executor(None, sample)
            work.add_done_callback(lambda _: steps.put_nowait(None))
            try:
                while (checkpoint := await steps.get()) is not None:
                    yield Note(f"step {checkpoint.step}/{checkpoint.steps}")
            finally:
                stop.set()
                await asyncio.wait([work])  # the turn ends when the GPU is free, not before
                error = work.exception()
                seconds = time.monotonic() - started
        if error is not None:
            raise error
        yield Done(seconds)
        yield work.result()
