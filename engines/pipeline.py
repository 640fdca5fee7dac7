"""The three stages of a model in one process: the whole product without Ray, and its first test."""

from collections.abc import Callable
from typing import Any

import torch

from engines.registry import load_model
from engines.spec import Checkpoint, Clip, Latents, RenderSpec


class Pipeline:
    """A loaded model. config: its config, e.g. `AnimateDiffConfig`."""

    def __init__(self, model: str, config: Any):
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        stages = load_model(model)
        self.preprocess = stages.preprocess(config)
        self.denoise = stages.denoise(config)
        self.decode = stages.decode(config)

    def latents(self, spec: RenderSpec, on_step: Callable[[Checkpoint], None] | None = None) -> Latents:
        """The clip before decoding."""
        return self.denoise.sample(self.preprocess.encode(spec), on_step=on_step)

    def render(self, spec: RenderSpec, on_step: Callable[[Checkpoint], None] | None = None) -> Clip:
        """The clip as a file. Raises `ModelError` for media that cannot be used."""
        return self.decode.decode(self.latents(spec, on_step))
