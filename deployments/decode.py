"""Serve's wrapper of a model's decoding."""

import asyncio
import time
from typing import Any

from engines.registry import build_stage
from engines.spec import Clip, Latents


class Decode:
    """One replica. config: of the model."""

    def __init__(self, model: str, config: Any):
        self.stage = build_stage(model, "decode", config)

    async def run(self, latents: Latents) -> tuple[Clip, float]:
        """The encoded clip, and the seconds it took; raw frames stay in this process."""
        started = time.monotonic()
        clip = await asyncio.to_thread(self.stage.decode, latents)
        return clip, time.monotonic() - started
