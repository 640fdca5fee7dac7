"""The three stages of a model in one process: renders a clip without Ray, for tests and benchmarks."""

from typing import Any

from engines.registry import build_stage
from engines.spec import Clip, Latents, OnProgress, OnStep, RenderSpec


class Pipeline:
    """A loaded model. config: its config, e.g. `AnimateDiffConfig`."""

    def __init__(self, model: str, config: Any):
        self.preprocess = build_stage(model, "preprocess", config)
        self.denoise = build_stage(model, "denoise", config)
        self.decode = build_stage(model, "decode", config)

    def latents(self, spec: RenderSpec, on_step: OnStep | None = None, on_progress: OnProgress | None = None) -> Latents:
        """The clip before decoding."""
        conditioning = self.preprocess.encode(spec, on_progress=on_progress)
        return self.denoise.sample(conditioning, on_step=on_step, on_progress=on_progress)

    def render(self, spec: RenderSpec, on_step: OnStep | None = None, on_progress: OnProgress | None = None) -> Clip:
        """The clip as a file. on_step: called by denoising. on_progress: called by all three stages. Raises `ModelError`."""
        return self.decode.decode(self.latents(spec, on_step, on_progress), on_progress=on_progress)
