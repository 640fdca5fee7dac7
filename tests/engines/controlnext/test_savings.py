"""Each exact saving of `video-models.md` section 5 (B) against the full computation in float64: they differ by rounding only."""

from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from engines.controlnext.config import ControlNeXtWeights
from engines.controlnext.denoise import Budget, ControlMaps, Denoise
from engines.controlnext.nets.control_net import ControlNet
from engines.controlnext.nets.layers import BlockSlots, Resnet, SpatialBlock, TemporalBlock, Transformer
from engines.controlnext.nets.unet import Control, inject
from engines.sampling import euler_step
from kernels.choice import forced
from tests.engines.controlnext import reference
from tests.engines.controlnext.conftest import conditioning, reference_nets
from tests.engines.rounding import assert_rounding, randn

TIME, IDS = 0.37, (6.0, 127.0, 0.02)


@pytest.fixture(scope="module")
def nets(controlnext_weights: ControlNeXtWeights) -> tuple[Any, Any]:
    return reference_nets(controlnext_weights, "float64")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.inference_mode():
        yield


def time_embedding(unet: Any) -> Tensor:
    """(1, E): the time embedding that every resnet of diffusers' UNet gets."""
    ids = unet.add_time_proj(torch.tensor(IDS)).flatten()[None].double()
    return unet.time_embedding(unet.time_proj(torch.tensor([TIME])).double()) + unet.add_embedding(ids)


@pytest.mark.parametrize("embedding", ["conditional", "unconditional"])
def test_5a_cross_attention_over_one_token_is_a_bias(nets: tuple[Any, Any], embedding: str):
    source = nets[0].down_blocks[0].attentions[0]
    image = randn(1, 32) if embedding == "conditional" else torch.zeros(1, 32, dtype=torch.float64)
    x = randn(5, 12, 32, seed=1)
    spatial, temporal = (
        SpatialBlock(source.transformer_blocks[0], 0),
        TemporalBlock(source.temporal_transformer_blocks[0], 0.0, 0),  # blend factor 0: the temporal path alone
    )
    stock = source.transformer_blocks[0](x, encoder_hidden_states=image.expand(5, 1, 32))
    assert_rounding(spatial(x.clone(), [spatial.attn.context_bias(image)]), stock)
    stock = source.temporal_transformer_blocks[0](x, num_frames=5, encoder_hidden_states=image.expand(12, 1, 32))
    assert_rounding(temporal(x, torch.zeros_like(x[:, :1]), [temporal.attn.context_bias(image)]), stock)


def test_5a_of_the_unconditional_half_only_the_output_bias_is_left(precise: Denoise):
    attention = precise.unet.down[0].layers[0].transformer.spatial[0].attn
    expected = attention.out.bias + attention.cross_out.bias
    assert torch.equal(attention.context_bias(torch.zeros(1, 32, dtype=torch.float64)), expected)


def test_5b_maps_are_computed_once_a_frame_and_serve_every_window(precise: Denoise, nets: tuple[Any, Any]):
    asked = conditioning(11)
    maps = ControlMaps(precise, asked.poses, [TIME]).of(range(11), 0)
    features = randn(4, 32, 4, 3)
    for frames in ([0, 1, 2, 3], [0, 5, 6, 7], [0, 8, 9, 10]):
        recomputed = nets[1](asked.poses[frames].double() / 255, torch.tensor(TIME))
        expected = features + reference.CONTROL_STRENGTH * reference.cross_normalized(recomputed, features)
        assert_rounding(inject(features, Control(maps[frames], 1.0)), expected)


def test_5b_the_control_net_runs_once_a_frame_and_step(precise: Denoise):
    frames: list[int] = []
    hook = precise.control_net.mid_convs[1].register_forward_hook(lambda _, args, out: frames.append(len(out)))
    precise.sample(conditioning(11))
    hook.remove()
    assert sum(frames) == 11 * 3


def test_5c_one_step_of_the_average_is_the_average_of_steps():
    x, one, other = randn(3, 4, 2, 2), randn(3, 4, 2, 2, seed=1), randn(3, 4, 2, 2, seed=2)
    together = euler_step(x, (one + other) / 2, 98.27, 70.54)
    assert_rounding(together, (euler_step(x, one, 98.27, 70.54) + euler_step(x, other, 98.27, 70.54)) / 2)


@pytest.mark.parametrize("kept_batches", [0, 1, 2])
def test_5d_the_prefix_does_not_depend_on_the_step_and_is_kept_within_its_budget(precise: Denoise, kept_batches: int):
    asked, times = conditioning(11), [1.6, TIME]  # 11 frames are batches of 8 and 3
    fresh = [ControlMaps(precise, asked.poses, times).of(range(11), i) for i in range(2)]
    maps = ControlMaps(precise, asked.poses, times)
    batch_bytes = precise.control_net.prefix(asked.poses[:8].double() / 255).size_bytes
    maps.budget = Budget(kept_batches * batch_bytes)
    calls: list[int] = []
    hook = precise.control_net.embedding.register_forward_hook(lambda _, args, out: calls.append(len(out)))
    for i in range(2):
        assert torch.equal(maps.of(range(11), i), fresh[i])
    hook.remove()
    assert calls == {0: [8, 3, 8, 3], 1: [8, 3, 3], 2: [8, 3]}[kept_batches]


def test_5e_pooling_commutes_with_cross_normalisation(precise: Denoise, nets: tuple[Any, Any]):
    images, features = randn(2, 3, 64, 48).abs().clamp(0, 1), randn(2, 32, 4, 3, seed=1)
    net: ControlNet = precise.control_net
    maps = net.finish(net.prefix(images), net.time_embeddings([TIME]), (4, 3))
    full = nets[1](images, torch.tensor(TIME))
    assert full.shape[2:] == (7, 5), "the pooling windows overlap"
    expected = features + reference.CONTROL_STRENGTH * reference.cross_normalized(full, features)
    assert_rounding(inject(features, Control(maps, 1.0)), expected)


def test_5f_conv_in_is_a_latent_part_and_a_constant_image_part(precise: Denoise, nets: tuple[Any, Any]):
    latents, image = randn(5, 4, 8, 6), randn(4, 8, 6, seed=1)
    half = precise.unet.guidance_half(image, randn(1, 32))
    split = F.conv2d(latents, precise.unet.conv_in.weight[:, :4], padding=1) + half.image
    assert_rounding(split, nets[0].conv_in(torch.cat([latents, image.expand(5, -1, -1, -1)], dim=1)))


def test_5g_time_projections_are_biases_of_the_convolutions_and_the_blend_is_folded_in(nets: tuple[Any, Any]):
    unet = nets[0]
    for source, channels in ((unet.down_blocks[0].resnets[0], 32), (unet.up_blocks[0].resnets[1], 96)):
        x = randn(5, channels, 8, 6)
        emb = time_embedding(unet)
        stock = source(x, emb.repeat_interleave(5, dim=0), torch.zeros(1, 5))
        resnet = Resnet(source, BlockSlots())
        active = F.silu(emb)
        biases = [resnet.spatial.time_biases(active)[0], resnet.temporal.time_biases(active)[0]]
        assert_rounding(resnet(x.contiguous(memory_format=torch.channels_last), biases), stock)


def test_5g_frame_positions_are_constants_of_the_weights(nets: tuple[Any, Any]):
    source = nets[0].mid_block.attentions[0]
    ours = Transformer(source, BlockSlots())
    x, image = randn(5, 64, 4, 3), randn(1, 32)
    context = [block.attn.context_bias(image) for block in (ours.spatial[0], ours.temporal[0])]
    stock = source(x, image.expand(5, 1, 32), torch.zeros(1, 5), return_dict=False)[0]
    for _ in range(2):  # the second time from the cache
        assert_rounding(ours(x.contiguous(memory_format=torch.channels_last), context), stock)


@pytest.mark.parametrize(("guidance", "calls_a_window"), [(1.0, 1), (3.0, 2)])
def test_5h_guidance_1_runs_one_half(precise: Denoise, guidance: float, calls_a_window: int):
    calls: list[int] = []
    hook = precise.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    precise.sample(conditioning(10, guidance_scale=guidance))
    hook.remove()
    assert len(calls) == 3 * 2 * calls_a_window  # steps, windows


@pytest.mark.parametrize("back_end", ["pytorch", "kernels"])
def test_the_whole_unet_equals_diffusers(precise: Denoise, nets: tuple[Any, Any], back_end: Literal["pytorch", "kernels"]):
    """Without a GPU the kernels' operations are their references."""
    latents, image, embedding = randn(5, 4, 8, 6), randn(4, 8, 6, seed=1), randn(1, 32, seed=2)
    stock_input = torch.cat([latents, image.expand(5, -1, -1, -1)], dim=1)[None]
    stock = nets[0](stock_input, torch.tensor(TIME), embedding[None], torch.tensor([IDS]), return_dict=False)[0]
    half, (time,) = precise.unet.guidance_half(image, embedding), precise.unet.time_biases([TIME], IDS)
    with forced(back_end):
        assert_rounding(precise.unet(latents, half, time), stock[0])
