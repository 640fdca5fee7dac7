from collections.abc import Iterator

import torch
from torch import Tensor

from engines.diffusion.step_loop import run_steps
from engines.sampling import restored_generator
from engines.solid.config import SolidConfig
from engines.solid.denoise import CountedUnit
from engines.solid.spec import SolidConditioning
from engines.spec import Checkpoint, Latents, OnProgress, OnStep
from engines.units import UnitRunner


class Sampler:
    """Steps of independent units, as ControlNeXt's, whose outputs are averaged in their order."""

    def __init__(self, config: SolidConfig):
        self.config = config

    def sample(
        self,
        conditioning: SolidConditioning,
        runner: UnitRunner,
        *,
        resume: Checkpoint | None = None,
        on_step: OnStep | None = None,
        on_progress: OnProgress | None = None,
    ) -> Latents:
        ran: set[str] = set()

        def step(x: Tensor, i: int, _: torch.Generator) -> Tensor:
            outputs = dict(runner.run(list(self._units(x, i)), lambda _: None))
            ran.update(output.engine for output in outputs.values())
            return torch.stack([outputs[n].values for n in range(len(outputs))]).mean(dim=0)

        start = resume or self._start(conditioning)
        x = run_steps(step, start, start.latents, torch.Tensor.clone, ran, on_step, on_progress)
        return Latents(x, conditioning.seed, engine="+".join(sorted(ran)))

    def _start(self, conditioning: SolidConditioning) -> Checkpoint:
        generator = restored_generator(conditioning.rng_state)
        noise = torch.rand((1, 1, self.config.frames, 8, 8), generator=generator) * 251
        return Checkpoint(0, conditioning.num_inference_steps, noise, generator.get_state())

    def _units(self, x: Tensor, i: int) -> Iterator[CountedUnit]:
        for n in range(self.config.units):
            yield CountedUnit(size=1.0, keeps=n, step=i, n=n, latents=x.clone())
