"""The loop over a request's steps, which both models share: every step is checked, reported, and can be resumed from.

Each model runs its steps on latents in its own layout; checkpoints hold them as a clip.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from engines.errors import GenerationFailed
from engines.sampling import restored_generator
from engines.spec import Checkpoint, OnProgress, OnStep, Progress

RunStep = Callable[[Tensor, int, torch.Generator], Tensor]
"""(latents before step i, i from 0, the request's generator) -> latents after it. A step's noise comes from the generator."""


def run_steps(
    run_step: RunStep,
    start: Checkpoint,
    x: Tensor,
    as_clip: Callable[[Tensor], Tensor],
    ran: set[str],
    on_step: OnStep | None = None,
    on_progress: OnProgress | None = None,
) -> Tensor:
    """The latents after the last step.

    x: the latents of `start`, on the device. as_clip: gives latents in the layout of a `Checkpoint`, on the host.
    ran: the names of the engines that ran the steps so far, which `run_step` adds to; those of the resumed steps are added here.
    on_step: called after each step with a checkpoint; a run with it as `start` gives the same bits as an uninterrupted one.
    on_progress: called before the first step and after each. Raises `GenerationFailed` after the first step whose latents are not
    finite; that step is not reported.
    """
    generator = restored_generator(start.rng_state)
    ran.update(start.engine.split("+") if start.engine else ())
    if on_progress is not None:
        on_progress(Progress("step", start.step, start.steps))
    for i in range(start.step, start.steps):
        x = run_step(x, i, generator)
        if not x.isfinite().all():
            raise GenerationFailed
        if on_step is not None:
            on_step(Checkpoint(i + 1, start.steps, as_clip(x), generator.get_state(), engine="+".join(sorted(ran))))
        if on_progress is not None:
            on_progress(Progress("step", i + 1, start.steps))
    return x
