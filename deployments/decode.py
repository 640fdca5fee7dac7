"""Serve's wrapper of a model's decoding."""

import asyncio
from typing import Any

from engines.registry import build_stage
from engines.spec import Clip, Latents


class Decode:
    """One replica. config: of the model."""

    def __init__(self, model: str, config: Any):
        self.stage = build_stage(model, "decode", config)

    async def run(self, latents: Latents) -> Clip:
        """The encoded clip; raw frames stay in this process."""
        return await asyncio.to_thread(self.stage.decode, latents)
