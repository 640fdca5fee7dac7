"""The step loop alone, with a step that adds noise to one number."""

import pytest
import torch
from torch import Tensor

from engines.diffusion.step_loop import run_steps
from engines.errors import GenerationFailed
from engines.sampling import seeded_generator
from engines.spec import Checkpoint, Progress

START = Checkpoint(0, 3, torch.zeros(1), seeded_generator(5).get_state())


def noisy(x: Tensor, i: int, generator: torch.Generator) -> Tensor:
    return x + i + torch.randn(1, generator=generator)


def test_every_checkpoint_leads_to_the_same_bits():
    kept: list[Checkpoint] = []
    whole = run_steps(noisy, START, START.latents, Tensor.clone, set(), kept.append)
    assert [(c.step, c.steps) for c in kept] == [(1, 3), (2, 3), (3, 3)]
    assert torch.equal(kept[-1].latents, whole)
    for checkpoint in kept:
        assert torch.equal(run_steps(noisy, checkpoint, checkpoint.latents, Tensor.clone, set()), whole)


def test_a_step_that_is_not_finite_ends_the_run_and_is_not_reported():
    kept: list[Checkpoint] = []
    told: list[Progress] = []
    with pytest.raises(GenerationFailed):
        run_steps(lambda x, i, _: x / (1 - i), START, torch.ones(1), Tensor.clone, set(), kept.append, told.append)
    assert [c.step for c in kept] == [1]
    assert told == [Progress("step", 0, 3), Progress("step", 1, 3)]


def test_a_checkpoint_tells_what_ran_its_steps_and_those_before():
    kept: list[Checkpoint] = []
    ran: set[str] = set()

    def step(x: Tensor, i: int, _: torch.Generator) -> Tensor:
        ran.add("inductor" if i < 1 else "eager")
        return x

    run_steps(step, START, START.latents, Tensor.clone, ran, kept.append)
    assert [checkpoint.engine for checkpoint in kept] == ["inductor", "eager+inductor", "eager+inductor"]
    ran = {"eager"}
    run_steps(step, kept[0], START.latents, Tensor.clone, ran)
    assert ran == {"eager", "inductor"}
