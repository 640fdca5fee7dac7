from typing import Any

import torch

from engines.spec import Latents, OnProgress, OnStep, Progress
from engines.units import UnitRunner
from tests.load.sleeping.denoise import SleepingConditioning, SleepingUnit


class Sampler:
    """Steps of independent units, as ControlNeXt's. It computes nothing: that would be the model's time."""

    def __init__(self, config: Any = None):
        pass

    def sample(
        self,
        conditioning: SleepingConditioning,
        runner: UnitRunner,
        *,
        resume: Any = None,
        on_step: OnStep | None = None,
        on_progress: OnProgress | None = None,
    ) -> Latents:
        steps = conditioning.num_inference_steps
        x = torch.zeros(conditioning.shape, dtype=torch.float16)
        for i in range(steps):
            keeps = [n if n % 2 == 0 else None for n in range(conditioning.units)]
            units = [SleepingUnit(size=1.0, keeps=each, latents=x) for each in keeps]
            outputs = {place: output.values for place, output in runner.run(units, lambda _: None)}
            x = outputs[0]
            if on_progress is not None:
                on_progress(Progress("step", i + 1, steps))
        return Latents(x, conditioning.seed, engine="asleep")
