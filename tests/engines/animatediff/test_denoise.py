from dataclasses import replace
from typing import Any

import pytest
import torch

from engines.animatediff.checkpoint import clip_shape
from engines.animatediff.config import AnimateDiffConfig, AnimateDiffWeights
from engines.animatediff.denoise import Denoise
from engines.animatediff.spec import AnimateDiffSpec
from engines.errors import Cancelled, GenerationFailed, WeightsError
from engines.pipeline import Pipeline
from engines.spec import Checkpoint, Progress
from tests.engines.animatediff.media import keyframes

SPEC = AnimateDiffSpec(3, 3, 2.0, "a red ball", "blur", "rgb", keyframes(0, 8))


@pytest.fixture(scope="module")
def pipeline(small_weights: AnimateDiffWeights) -> Pipeline:
    return Pipeline("animatediff-sparsectrl-lcm", AnimateDiffConfig(weights=small_weights, threads=1))


@pytest.fixture(params=["scribble", "rgb", "none"])
def conditioning(pipeline: Pipeline, request: pytest.FixtureRequest) -> Any:
    spec = replace(SPEC, keyframes=()) if request.param == "none" else replace(SPEC, controlnet_type=request.param)
    return pipeline.preprocess.encode(spec)


def test_the_same_request_gives_the_same_bits_in_another_process_life(pipeline: Pipeline, conditioning: Any):
    torch.manual_seed(99)
    one = pipeline.denoise.sample(conditioning)
    fresh = Denoise(pipeline.denoise.config).sample(conditioning)
    assert torch.equal(one.values, fresh.values)
    assert one.values.shape == (1, 4, 16, 4, 4)


def test_another_seed_gives_another_clip(pipeline: Pipeline):
    assert not torch.equal(pipeline.latents(SPEC).values, pipeline.latents(replace(SPEC, seed=4)).values)


def test_a_run_resumed_at_any_step_has_the_bits_of_an_undisturbed_one(pipeline: Pipeline, conditioning: Any):
    checkpoints: list[Checkpoint] = []
    whole = pipeline.denoise.sample(conditioning, on_step=checkpoints.append)
    assert [c.step for c in checkpoints] == [1, 2, 3]
    for checkpoint in checkpoints:
        resumed = pipeline.denoise.sample(conditioning, resume=checkpoint)
        assert torch.equal(whole.values, resumed.values), f"resumed at step {checkpoint.step}"


def test_progress_is_told_step_by_step_from_where_the_run_begins(pipeline: Pipeline):
    checkpoints: list[Checkpoint] = []
    told: list[Progress] = []
    conditioning = pipeline.preprocess.encode(SPEC)
    pipeline.denoise.sample(conditioning, on_step=checkpoints.append, on_progress=told.append)
    assert told == [Progress("step", done, 3) for done in range(4)]
    told.clear()
    pipeline.denoise.sample(conditioning, resume=checkpoints[1], on_progress=told.append)
    assert told == [Progress("step", done, 3) for done in (2, 3)]


def test_chunks_of_steps_cover_every_step(pipeline: Pipeline):
    conditioning = pipeline.preprocess.encode(replace(SPEC, num_inference_steps=4))
    expected = pipeline.denoise.sample(conditioning).values
    for control_steps in (1, 2, 3):
        chunked = Denoise(replace(pipeline.denoise.config, control_steps=control_steps, control_cache_bytes=0))
        assert (chunked.sample(conditioning).values - expected).abs().max() <= 1e-4, f"{control_steps} steps a chunk"


def test_a_stop_is_obeyed_within_one_call_of_the_unet(pipeline: Pipeline):
    conditioning = pipeline.preprocess.encode(SPEC)
    calls: list[int] = []
    hook = pipeline.denoise.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(Cancelled):
        pipeline.denoise.sample(conditioning, should_stop=lambda: len(calls) == 2)
    assert len(calls) == 2
    with pytest.raises(Cancelled):
        pipeline.denoise.sample(conditioning, should_stop=lambda: True)
    assert len(calls) == 2, "a request that is cancelled before it starts costs no call"
    hook.remove()


def test_without_keyframes_sparsectrl_does_not_run(pipeline: Pipeline):
    calls: list[int] = []
    hooks = [net.register_forward_pre_hook(lambda *_: calls.append(1)) for net in pipeline.denoise.controls.values()]
    pipeline.latents(replace(SPEC, keyframes=()))
    for hook in hooks:
        hook.remove()
    assert not calls


def test_values_that_are_not_finite_are_an_error(pipeline: Pipeline):
    conditioning = pipeline.preprocess.encode(SPEC)
    poisoned = replace(conditioning, text=torch.full_like(conditioning.text, torch.nan))
    with pytest.raises(GenerationFailed):
        pipeline.denoise.sample(poisoned)


def test_a_frame_count_beyond_the_position_table_is_refused(pipeline: Pipeline):
    with pytest.raises(WeightsError, match="positions for 32 frames, not 33"):
        Denoise(replace(pipeline.denoise.config, num_frames=33))


def test_a_size_that_the_unet_cannot_halve_is_refused(pipeline: Pipeline):
    config: AnimateDiffConfig = replace(pipeline.denoise.config, height=72)
    with pytest.raises(WeightsError, match="32x72 is not a multiple of 16 pixels"):
        clip_shape(config)


def test_the_residual_cache_keeps_to_its_budget(pipeline: Pipeline):
    short = replace(SPEC, num_inference_steps=1)
    stage = Denoise(pipeline.denoise.config)
    stage.sample(pipeline.preprocess.encode(short))
    size = stage.residuals.size_bytes
    assert size > 0
    small = Denoise(replace(pipeline.denoise.config, control_cache_bytes=2 * size))
    for seed in range(4):  # each seed draws a different rgb control
        small.sample(pipeline.preprocess.encode(replace(short, seed=seed)))
    assert small.residuals.size_bytes == 2 * size
