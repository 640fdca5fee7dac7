import gc
import pickle
import random
import shutil
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.checkpoints.checkpoint_file import pack, unpack
from engines.checkpoints.source import DType
from engines.controlnext.config import ControlNeXtWeights
from engines.controlnext.denoise import ControlMaps, Denoise
from engines.controlnext.noise import SCHEDULER
from engines.controlnext.sampler import Sampler, WindowUnit
from engines.controlnext.spec import ControlNeXtConditioning
from engines.errors import Cancelled, GenerationFailed
from engines.spec import Checkpoint, Progress
from engines.units import UnitOutput
from tests.engines.controlnext.conftest import conditioning

IDS = (6.0, 127.0, 0.02)


def test_the_same_request_gives_the_same_bits_in_another_process_life(denoise: Denoise):
    torch.manual_seed(99)
    asked = conditioning(7, num_inference_steps=2)
    one = denoise.sample(asked)
    assert torch.equal(one.values, Denoise(denoise.config).sample(asked).values)
    assert (one.seed, one.decode_chunk_size, one.fps) == (7, 2, 7)


def test_a_run_resumed_at_any_step_has_the_bits_of_an_undisturbed_one(denoise: Denoise):
    asked = conditioning(7)
    checkpoints: list[Checkpoint] = []
    whole = denoise.sample(asked, on_step=checkpoints.append)
    assert [(c.step, c.steps) for c in checkpoints] == [(1, 3), (2, 3), (3, 3)]
    for checkpoint in checkpoints:
        resumed = denoise.sample(asked, resume=checkpoint)
        assert torch.equal(resumed.values, whole.values), f"resumed at step {checkpoint.step}"
    file = pack(checkpoints[0], "a fingerprint")
    of_another_process = Denoise(denoise.config).sample(asked, resume=unpack(file, Checkpoint, "a fingerprint"))
    assert torch.equal(of_another_process.values, whole.values)


def test_how_many_frames_share_a_control_call_does_not_matter(denoise: Denoise):
    asked = conditioning(7, num_inference_steps=1)
    one_by_one = Denoise(replace(denoise.config, control_batch_frames=1, control_cache_bytes=0))
    assert (one_by_one.sample(asked).values - denoise.sample(asked).values).abs().max() <= 1e-4


def test_another_requests_checkpoint_is_refused(denoise: Denoise):
    checkpoints: list[Checkpoint] = []
    denoise.sample(conditioning(4), on_step=checkpoints.append)
    for other in (conditioning(5), conditioning(4, num_inference_steps=2)):
        with pytest.raises(ValueError, match="belongs to another request"):
            denoise.sample(other, resume=checkpoints[0])


@pytest.mark.parametrize("end", ["done", "cancelled", "failed"])
def test_the_memory_of_a_request_is_free_when_it_ends(denoise: Denoise, monkeypatch: pytest.MonkeyPatch, end: str):
    made: list[weakref.ref[ControlMaps]] = []

    class Watched(ControlMaps):
        def __init__(self, *args: Any):
            super().__init__(*args)
            made.append(weakref.ref(self))

    monkeypatch.setattr("engines.controlnext.denoise.ControlMaps", Watched)
    asked = conditioning(4)
    if end == "failed":
        asked = replace(asked, image_latent=torch.full_like(asked.image_latent, torch.nan))
    gc.disable()  # gigabytes of a GPU cannot wait for it
    try:
        with suppress(Cancelled, GenerationFailed):
            denoise.sample(asked, should_stop=lambda: end == "cancelled" and len(made) > 0)
        assert [ref() for ref in made] == [None]
    finally:
        gc.enable()


def count_calls(denoise: Denoise) -> tuple[list[str], Callable[[], None]]:
    calls: list[str] = []
    nets: dict[str, Any] = {"unet": denoise.unet, "control": denoise.control_net.mid_convs[1]}
    hooks = [net.register_forward_pre_hook(lambda *_, name=name: calls.append(name)) for name, net in nets.items()]
    return calls, lambda: [hook.remove() for hook in hooks]  # type: ignore[func-returns-value, return-value]


@pytest.mark.parametrize("allowed", [0, 1, 2, 5])
def test_a_stop_is_obeyed_within_one_call_of_a_net(denoise: Denoise, allowed: int):
    calls, remove = count_calls(denoise)
    try:
        with pytest.raises(Cancelled):
            denoise.sample(conditioning(7), should_stop=lambda: len(calls) >= allowed)
    finally:
        remove()
    assert len(calls) == allowed


def test_at_a_control_scale_of_0_the_control_net_does_not_run(denoise: Denoise):
    calls, remove = count_calls(denoise)
    denoise.sample(conditioning(2, controlnext_cond_scale=0.0, num_inference_steps=1))
    remove()
    assert set(calls) == {"unet"}


def test_latents_that_are_not_finite_are_an_error_at_once(denoise: Denoise):
    asked = conditioning(4)
    steps: list[Checkpoint] = []
    with pytest.raises(GenerationFailed):
        denoise.sample(replace(asked, image_latent=torch.full_like(asked.image_latent, torch.nan)), on_step=steps.append)
    assert not steps


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_gives_about_the_same_video(controlnext_weights: ControlNeXtWeights, denoise: Denoise, dtype: DType):
    half = Denoise(replace(denoise.config, dtype=dtype))
    assert half.unet.conv_in.weight.dtype == getattr(torch, dtype)
    asked = conditioning(4, num_inference_steps=2)
    ours, full = half.sample(asked).values, denoise.sample(asked).values
    assert ours.dtype == torch.float32
    correlation = torch.corrcoef(torch.stack([ours.flatten(), full.flatten()]))[0, 1]
    assert correlation > 0.99


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_in_half_precision_the_ids_are_embedded_in_fp32(denoise: Denoise, dtype: DType):
    """0.02 is 0.02002 in bf16."""
    half = Denoise(replace(denoise.config, dtype=dtype))
    for biases in zip(half.unet.time_biases([0.7], IDS)[0], denoise.unet.time_biases([0.7], IDS)[0], strict=True):
        assert (biases[0].float() - biases[1]).abs().max() < 0.03
    seen: list[torch.Tensor] = []
    hook = half.unet.ids_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    half.unet.time_biases([0.7], IDS)
    hook.remove()
    assert torch.equal(seen[0], torch.tensor(IDS))


def test_progress_is_told_window_by_window_and_never_goes_back(denoise: Denoise):
    told: list[Progress] = []
    denoise.sample(conditioning(7), on_progress=told.append)
    windows = len({progress.within.total for progress in told if progress.within})
    assert windows == 1
    assert told[0] == Progress("step", 0, 3)
    assert told[-1] == Progress("step", 3, 3)
    assert [progress.done for progress in told if progress.within is None] == [0, 1, 2, 3]
    inside = [progress for progress in told if progress.within is not None and progress.done == 1]
    assert [progress.within.done for progress in inside if progress.within] == list(range(1, len(inside) + 1))
    fractions = [progress.fraction for progress in told]
    assert fractions == sorted(set(fractions))
    assert (fractions[0], fractions[-1]) == (0, 1)


def test_a_resumed_run_tells_where_it_begins(denoise: Denoise):
    checkpoints: list[Checkpoint] = []
    told: list[Progress] = []
    asked = conditioning(4)
    denoise.sample(asked, on_step=checkpoints.append)
    denoise.sample(asked, resume=checkpoints[1], on_progress=told.append)
    assert told[0] == Progress("step", 2, 3)


class Scattered:
    """Runs the units of a step in another order, each by a request of its own, as if replicas had just come."""

    def __init__(self, denoise: Denoise, asked: ControlNeXtConditioning):
        self.denoise, self.asked = denoise, asked
        self.order = random.Random(3)

    def run(self, units: Sequence[WindowUnit], tell: Any) -> Iterator[tuple[int, UnitOutput]]:
        for place in self.order.sample(range(len(units)), len(units)):
            unit = pickle.loads(pickle.dumps(units[place]))
            assert unit.latents.untyped_storage().nbytes() == unit.latents.nbytes, "no more is sent than the window"
            yield place, self.denoise.begin(self.asked).run(unit, tell, None)


@pytest.mark.parametrize("changes", [{}, {"guidance_scale": 1.0}, {"controlnext_cond_scale": 0.0}])
def test_neither_the_order_of_units_nor_who_runs_them_changes_a_bit(denoise: Denoise, changes: dict[str, float]):
    asked, told = conditioning(13, **changes), list[Progress]()
    scattered = Sampler(denoise.config).sample(asked, Scattered(denoise, asked), on_progress=told.append)
    assert torch.equal(scattered.values, denoise.sample(asked).values)
    fractions = [progress.fraction for progress in told]
    assert fractions == sorted(set(fractions))


def test_the_sampler_is_ready_without_a_network(denoise: Denoise, tmp_path: Path):
    """On a node of its own it downloads one small file."""
    weights = denoise.config.weights
    assert isinstance(weights, ControlNeXtWeights)
    assert weights.base.folder is not None
    (tmp_path / SCHEDULER).parent.mkdir()
    shutil.copy(weights.base.folder / SCHEDULER, tmp_path / SCHEDULER)
    alone = replace(weights, base=replace(weights.base, folder=tmp_path))
    assert Sampler(replace(denoise.config, weights=alone)).noise == denoise.noise


def test_requests_share_the_memory_for_prefixes_and_give_it_back(denoise: Denoise):
    budget = denoise.prefixes.spare_bytes
    one, other = denoise.begin(conditioning(10)), denoise.begin(conditioning(10))
    for request in (one, other):
        assert request.maps is not None
        request.maps.of(range(10), 0)
    assert budget - denoise.prefixes.spare_bytes == 2 * sum(p.size_bytes for p in one.maps._kept.values()) > 0  # type: ignore[union-attr]
    del one, other, request
    assert denoise.prefixes.spare_bytes == budget
