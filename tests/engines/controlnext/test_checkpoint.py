"""Key names and shapes of the published files, and what is refused. Full-size nets are on the meta device, without memory."""

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from safetensors.torch import load_file, save_file

from engines.checkpoints.weights import build, load_strict
from engines.controlnext.checkpoint import load_control_net, load_diffusers_unet, load_vae, size_multiple
from engines.controlnext.config import ControlNeXtConfig, ControlNeXtWeights
from engines.controlnext.demo_weights import DemoSize, write_demo_weights
from engines.controlnext.denoise import Denoise
from engines.controlnext.nets.control_net import ControlNet, ControlNetSize
from engines.controlnext.noise import load_noise_range
from engines.errors import WeightsError
from tests.engines.controlnext.conftest import conditioning, first_noise
from tests.engines.controlnext.reference import ReferenceControlNet, sample

PUBLISHED_CONTROL_NET = {  # video-models.md, 1B
    "time_embedding.linear_1": (256, 128),
    "time_embedding.linear_2": (256, 256),
    "embedding.0": (64, 3, 3, 3),
    "embedding.1": (64,),
    "embedding.3": (64, 64, 3, 3),
    "embedding.4": (64,),
    "embedding.6": (128, 64, 3, 3),
    "embedding.7": (128,),
    "down_res.0.norm1": (128,),
    "down_res.0.conv1": (128, 128, 3, 3),
    "down_res.0.time_emb_proj": (128, 256),
    "down_res.0.norm2": (128,),
    "down_res.0.conv2": (128, 128, 3, 3),
    "down_sample.0.conv": (128, 128, 3, 3),
    "down_res.1.norm1": (128,),
    "down_res.1.conv1": (256, 128, 3, 3),
    "down_res.1.time_emb_proj": (256, 256),
    "down_res.1.norm2": (256,),
    "down_res.1.conv2": (256, 256, 3, 3),
    "down_res.1.conv_shortcut": (256, 128, 1, 1),
    "down_sample.1.conv": (256, 256, 3, 3),
    "mid_convs.0.0": (256, 256, 3, 3),
    "mid_convs.0.2": (256,),
    "mid_convs.0.3": (256, 256, 3, 3),
    "mid_convs.0.4": (256,),
    "mid_convs.1": (320, 256, 1, 1),
}

PUBLISHED_UNET: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "num_attention_heads": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 768,
}


def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def test_the_control_net_has_the_published_names_and_shapes():
    published = {f"{name}.weight": shape for name, shape in PUBLISHED_CONTROL_NET.items()}
    published |= {f"{name}.bias": shape[:1] for name, shape in PUBLISHED_CONTROL_NET.items()}
    net = build(ControlNet)
    assert shapes(net) == published
    assert len(published) == 52
    assert (
        sum(p.numel() for p in net.parameters()) == 3_526_400 == sum(p.numel() for p in build(ReferenceControlNet).parameters())
    )


def test_the_unet_has_the_published_number_of_keys_and_parameters_and_no_key_of_v1():
    unet = build(lambda: UNetSpatioTemporalConditionModel(**PUBLISHED_UNET))
    keys = shapes(unet)
    assert len(keys) == 1428
    assert round(sum(p.numel() for p in unet.parameters()) / 1e6, 2) == 1524.62
    pinned = {
        "conv_in.weight": (320, 8, 3, 3),
        "add_embedding.linear_1.weight": (1280, 768),
        "down_blocks.0.resnets.0.temporal_res_block.conv1.weight": (320, 320, 3, 1, 1),
        "down_blocks.1.resnets.0.spatial_res_block.conv_shortcut.weight": (640, 320, 1, 1),
        "down_blocks.2.attentions.1.temporal_transformer_blocks.0.ff_in.net.0.proj.weight": (10240, 1280),
        "down_blocks.0.attentions.0.time_mixer.mix_factor": (1,),
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight": (1280, 1024),
        "up_blocks.3.attentions.2.time_pos_embed.linear_2.weight": (320, 1280),
        "conv_out.weight": (4, 320, 3, 3),
    }
    assert {key: keys[key] for key in pinned} == pinned


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> ControlNeXtWeights:
    """The published width at the injection, 320 channels, and the published control net."""
    size = DemoSize(channels=(320, 32), heads=(5, 1), control=ControlNetSize())
    return write_demo_weights(tmp_path_factory.mktemp("wide") / "controlnext", size)


def test_a_320_wide_checkpoint_has_the_published_shapes_and_renders_as_the_reference(wide: ControlNeXtWeights):
    folder = wide.control.folder
    assert folder is not None
    (folder / "controlnet.json").unlink()  # the published checkpoint has no such file
    config = ControlNeXtConfig(weights=wide, threads=1)
    tensors = load_file(folder / "controlnet.safetensors")
    assert {key: tuple(value.shape) for key, value in tensors.items()} == shapes(build(ControlNet))

    published = shapes(build(lambda: UNetSpatioTemporalConditionModel(**PUBLISHED_UNET)))
    unet = load_diffusers_unet(config)
    of_width = {k: v for k, v in shapes(unet).items() if k.startswith("down_blocks.0.") and "attn2.to_" not in k}
    assert len(of_width) > 60
    assert of_width == {key: published[key] for key in of_width}

    net = ReferenceControlNet()
    net.load_state_dict(tensors)
    asked = conditioning(2, num_inference_steps=2)
    expected = sample(
        *(unet, net.eval(), asked.poses, asked.image_latent, asked.image_embedding, first_noise(2)),
        steps=2,
        guidance=3.0,
        batch_frames=6,
        overlap=2,
        ids=asked.added_ids,
        dtype=torch.float64,  # the reference's formula for a step from 700 to 0.002 loses 1e-4 in fp32
    )
    assert (Denoise(config).sample(asked).values - expected.transpose(1, 2)).abs().max() <= 1e-4


def test_a_net_of_another_architecture_is_refused(controlnext_weights: ControlNeXtWeights, tmp_path: Path):
    full = {key: torch.zeros(shape) for key, shape in shapes(build(ControlNet)).items()}
    del full["mid_convs.1.bias"]
    with pytest.raises(WeightsError, match=r"1 missing: mid_convs\.1\.bias"):
        load_strict(build(ControlNet), full, "v1", torch.float32)
    save_file({"mid_convs.1.weight": torch.zeros(1)}, tmp_path / "controlnet.safetensors")
    config = ControlNeXtConfig(
        weights=replace(controlnext_weights, control=replace(controlnext_weights.control, folder=tmp_path))
    )
    with pytest.raises(WeightsError, match="51 missing"):
        load_control_net(config)


def test_a_pickle_is_refused_with_a_hint_how_to_convert_it(controlnext_weights: ControlNeXtWeights, tmp_path: Path):
    (tmp_path / "unet.bin").write_bytes(pickle.dumps(print))
    source = replace(controlnext_weights.unet, folder=tmp_path, file="unet.bin")
    with pytest.raises(WeightsError, match="reelray convert-weights"):
        load_diffusers_unet(ControlNeXtConfig(weights=replace(controlnext_weights, unet=source)))


def test_another_noise_schedule_is_refused(controlnext_weights: ControlNeXtWeights, tmp_path: Path):
    noise = load_noise_range(controlnext_weights)
    assert (noise.sigma_min, noise.sigma_max) == (0.002, 700.0)
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"prediction_type": "epsilon"}))
    with pytest.raises(WeightsError, match="prediction_type is 'epsilon'"):
        load_noise_range(replace(controlnext_weights, base=replace(controlnext_weights.base, folder=tmp_path)))


def test_sizes_must_be_multiples_of_the_nets_downsampling(controlnext_weights: ControlNeXtWeights):
    assert size_multiple(controlnext_weights) == 16  # the demo's two levels; four as published make 64


def test_the_vae_is_held_in_the_dtype_that_was_asked_for(controlnext_weights: ControlNeXtWeights):
    config = ControlNeXtConfig(weights=controlnext_weights)
    assert load_vae(config, torch.bfloat16).dtype == torch.bfloat16
