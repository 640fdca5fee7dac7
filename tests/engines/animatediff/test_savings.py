"""Each exact saving of `video-models.md` section 5 against the full computation in float64: they differ by rounding only."""

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from engines.animatediff.checkpoint import load_diffusers_sparse_control, load_diffusers_unet, load_sparse_control, load_unet
from engines.animatediff.config import AnimateDiffConfig, AnimateDiffWeights
from engines.animatediff.nets.layers import CrossAttention, SelfAttention, TemporalAttention
from engines.animatediff.spec import AnimateDiffSpec, ControlType
from engines.checkpoints.weights import fold_lora
from engines.pipeline import Pipeline
from kernels.choice import forced
from tests.engines.animatediff.media import keyframes
from tests.engines.rounding import assert_rounding, randn

FRAMES = 8
TIMESTEPS = (999, 499, 259)


@pytest.fixture(scope="module")
def config(demo_weights: AnimateDiffWeights) -> AnimateDiffConfig:
    return AnimateDiffConfig(weights=demo_weights, dtype="float64")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.inference_mode():
        yield


def full_condition(values: Tensor, frames: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The condition and its mask on all frames, as the reference takes them: (1, C, F, h, w) and (1, 1, F, h, w)."""
    condition = values.new_zeros(1, values.shape[1], FRAMES, *values.shape[2:])
    mask = values.new_zeros(1, 1, FRAMES, *values.shape[2:])
    condition[0, :, list(frames)], mask[:, :, list(frames)] = values.transpose(0, 1), 1.0
    return condition, mask


def reference_residuals(net: Any, values: Tensor, frames: tuple[int, ...], t: int, text: Tensor, latents: Tensor) -> list[Tensor]:
    condition, mask = full_condition(values, frames)
    repeated = text.repeat_interleave(FRAMES, dim=0)
    skips, mid = net(latents, t, repeated, controlnet_cond=condition, conditioning_mask=mask, return_dict=False)
    return [*skips, mid]


def control_values(kind: ControlType) -> Tensor:
    return randn(2, 3, 64, 64).abs().clamp(0, 1) if kind == "scribble" else randn(2, 4, 8, 8)


@pytest.mark.parametrize("kind", ["scribble", "rgb"])
def test_5k_sparsectrl_does_not_depend_on_the_latents(config: AnimateDiffConfig, kind: ControlType):
    net = load_diffusers_sparse_control(config, kind)
    args = (control_values(kind), (0, 4), 759, randn(1, 77, 32))
    one = reference_residuals(net, *args, randn(1, 4, FRAMES, 8, 8, seed=1))
    other = reference_residuals(net, *args, randn(1, 4, FRAMES, 8, 8, seed=2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", ["scribble", "rgb"])
def test_5k_all_steps_in_one_batch_equal_one_by_one(config: AnimateDiffConfig, kind: ControlType):
    net = load_sparse_control(config, kind)
    columns, context = net.columns(control_values(kind)), net.text_context(randn(2, 77, 32))
    batched = net(columns, (3, 6), FRAMES, TIMESTEPS, context)
    for t, together in zip(TIMESTEPS, batched, strict=True):
        (alone,) = net(columns, (3, 6), FRAMES, (t,), context)
        for a, b in zip((*together.skips, together.mid), (*alone.skips, alone.mid), strict=True):
            assert_rounding(a, b)


def test_5k_a_second_seed_reuses_the_residuals_and_gets_the_bits_of_a_lone_run(
    pipeline: Pipeline, demo_weights: AnimateDiffWeights
):
    spec = AnimateDiffSpec(1, 2, 2.0, "a red ball", keyframes=keyframes(0, 8))
    config = AnimateDiffConfig(weights=demo_weights, threads=1, control_steps=2)
    fresh = Pipeline("animatediff-sparsectrl-lcm", config)
    calls: list[int] = []
    fresh.denoise.controls["scribble"].register_forward_pre_hook(lambda *_: calls.append(1))
    fresh.latents(spec)
    shared = fresh.latents(replace(spec, seed=2))
    assert len(calls) == 1
    lone = Pipeline("animatediff-sparsectrl-lcm", config).latents(replace(spec, seed=2))
    assert torch.equal(shared.values, lone.values)
    fresh.latents(replace(spec, seed=2, prompt="a blue ball"))
    fresh.latents(replace(spec, seed=2, keyframes=keyframes(0, 9)))
    assert len(calls) == 3, "another prompt or keyframe must not reuse the residuals"


@pytest.mark.parametrize("kind", ["scribble", "rgb"])
def test_5l_keyframes_and_one_empty_frame_stand_for_all_frames(config: AnimateDiffConfig, kind: ControlType):
    net, values, frames = load_sparse_control(config, kind), control_values(kind), (3, 6)
    condition, mask = full_condition(values, frames)
    every_frame = torch.cat([condition, mask], dim=1)[0].transpose(0, 1)
    embedded = net.condition_embedding(every_frame) + net.conv_in(torch.zeros(FRAMES, 4, 8, 8, dtype=torch.float64))
    columns = net.columns(values)
    for f in range(FRAMES):
        assert_rounding(embedded[f], columns[frames.index(f) if f in frames else len(frames)])


@pytest.mark.parametrize(("kind", "frames"), [("scribble", (3, 6)), ("scribble", (7, 0)), ("rgb", (0,)), ("rgb", (7, 0))])
def test_5m_few_columns_before_the_first_motion_module_equal_all_frames(
    config: AnimateDiffConfig, kind: ControlType, frames: tuple[int, ...]
):
    ours, theirs = load_sparse_control(config, kind), load_diffusers_sparse_control(config, kind)
    values, text = control_values(kind)[: len(frames)], randn(2, 77, 32)
    residuals = ours(ours.columns(values), frames, FRAMES, TIMESTEPS, ours.text_context(text))
    for t, computed in zip(TIMESTEPS, residuals, strict=True):
        latents = torch.zeros(2, 4, FRAMES, 8, 8, dtype=torch.float64)
        for a, b in zip(
            (*computed.skips, computed.mid), reference_residuals(theirs, values, frames, t, text, latents), strict=True
        ):
            assert_rounding(a, b)


def test_5n_shared_keys_and_values_equal_text_repeated_for_every_frame(config: AnimateDiffConfig):
    source = load_diffusers_unet(config).down_blocks[0].attentions[0].transformer_blocks[0].attn2
    x, text = randn(2 * FRAMES, 64, 32), randn(2, 77, 32, seed=1)
    expected = source(x, encoder_hidden_states=text.repeat_interleave(FRAMES, dim=0))
    ours = CrossAttention(source, slot=0)
    assert_rounding(ours(x, torch.zeros_like(x), [ours.keys_values(text)]), expected)


def test_5o_a_folded_lora_equals_one_run_beside_the_weights():
    layers = {"linear": nn.Linear(24, 40, bias=False), "conv": nn.Conv2d(24, 40, 3, padding=1, bias=False)}
    inputs = {"linear": randn(5, 24), "conv": randn(5, 24, 6, 6)}
    for name, layer in layers.items():
        layer.double()
        down, up = randn(4, *layer.weight.shape[1:], seed=1), randn(40, 4, *(1,) * (layer.weight.ndim - 2), seed=2)
        apply = F.linear if name == "linear" else F.conv2d
        beside = apply(apply(inputs[name], down, **({} if name == "linear" else {"padding": 1})), up)
        expected = layer(inputs[name]) + 0.8 * (2.0 / 4) * beside
        weights = {"net.layer.weight": layer.weight}
        fold_lora(
            weights,
            {
                "lora_unet_net_layer.lora_down.weight": down,
                "lora_unet_net_layer.lora_up.weight": up,
                "lora_unet_net_layer.alpha": torch.tensor(2.0),
            },
            0.8,
            "test",
        )
        layer.weight = nn.Parameter(weights["net.layer.weight"])
        assert_rounding(layer(inputs[name]), expected)


@pytest.mark.parametrize("frames", [1, FRAMES, 32])
def test_5p_the_position_table_as_a_bias_equals_adding_it_to_the_input(config: AnimateDiffConfig, frames: int):
    block = load_diffusers_unet(config).down_blocks[0].motion_modules[0].transformer_blocks[0]
    x = randn(7, frames, 32)
    images = x.transpose(0, 1)
    ours = TemporalAttention(block.attn1, block.pos_embed.pe)(images, torch.zeros(images.shape).to(x), frames)
    assert_rounding(ours.transpose(0, 1), block.attn1(block.pos_embed(x)))


def test_5q_at_guidance_one_the_negative_prompt_is_neither_encoded_nor_run(pipeline: Pipeline):
    spec = AnimateDiffSpec(5, 2, 1.0, "a red ball", keyframes=keyframes(0))
    encoded: list[int] = []
    hook = pipeline.preprocess.text_encoder.register_forward_hook(lambda _, args, __: encoded.append(args[0].shape[0]))
    plain = pipeline.latents(spec)
    assert sum(encoded) == 1
    negative = pipeline.latents(replace(spec, negative_prompt="a blue ball"))
    hook.remove()
    assert torch.equal(plain.values, negative.values)
    guided = pipeline.latents(replace(spec, negative_prompt="a blue ball", guidance_scale=1.5))
    assert not torch.equal(guided.values, plain.values)


@pytest.mark.parametrize("back_end", ["pytorch", "kernels"])
def test_the_whole_unet_equals_that_of_diffusers(config: AnimateDiffConfig, back_end: Literal["pytorch", "kernels"]):
    """Without a GPU the kernels' operations are their references."""
    ours, theirs = load_unet(config), load_diffusers_unet(config)
    latents, text = randn(2, 4, FRAMES, 8, 8), randn(2, 77, 32, seed=1)
    expected = theirs(latents, 499, text.repeat_interleave(FRAMES, dim=0)).sample
    with forced(back_end):
        assert_rounding(ours(latents, ours.time_embeddings((499,)), ours.text_context(text)), expected)


def test_self_attention_equals_that_of_diffusers(config: AnimateDiffConfig):
    source = load_diffusers_unet(config).down_blocks[0].attentions[0].transformer_blocks[0].attn1
    x = randn(3, 64, 32)
    assert_rounding(SelfAttention(source)(x, torch.zeros_like(x)), source(x))
