"""Tiny checkpoints in the hub's layouts: random but seeded, so that everything runs without a hub and without a GPU.

They give coloured noise, not videos; their purpose is to be loaded, moved and compared like the real ones. Sizes:
`video-models.md` section 8 (64x64 pixels, 16 frames, about 16 MB in all).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, MotionAdapter, SparseControlNetModel, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from engines.animatediff.checkpoint import KNOWN_WORDS, OLD_VAE_NAMES
from engines.animatediff.config import AnimateDiffWeights
from engines.demo.animatediff.tokenizer import TOKENS, write_tokenizer
from engines.demo.checkpoint import live, write_json, write_once

_WIDTH = 32  # of the text embedding
_HEADS = 4
_GROUPS = 8  # SD's 32 would force channels in multiples of 32
_RANK = 4

_SCHEDULER = {  # SD 1.5's own, with the scaled-linear betas that the loader must replace. Only the prediction type differs:
    # with epsilon, the output of random weights would be divided by sqrt(abar_999) = 0.04 and hide everything else
    "prediction_type": "v_prediction",
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


@dataclass(frozen=True)
class DemoSize:
    """Of the random checkpoint.

    channels: of the UNet's levels. layers: of a level; the published UNet has two.
    latent: height and width in latents of 8 pixels. vae_channels: of the VAE's levels.
    """

    channels: tuple[int, int] = (32, 64)
    layers: int = 1
    latent: int = 8
    vae_channels: tuple[int, int, int, int] = (8, 8, 16, 16)


TINY = DemoSize()


def write_demo_weights(folder: Path, size: DemoSize = TINY) -> AnimateDiffWeights:
    """Write all parts to `folder`, completely or not at all, unless it exists. Returns where each part is."""
    write_once(folder, lambda draft: _write_all(AnimateDiffWeights.demo(draft), size))
    return AnimateDiffWeights.demo(folder)


@dataclass(frozen=True)
class DemoParts:
    """The modules of a checkpoint. words: of which the tokenizer makes one token each. lora: of the UNet, in kohya's key style.

    old_vae: the base's own VAE, which `vae` replaces; None leaves it out.
    """

    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    motion_adapter: MotionAdapter
    scribble: SparseControlNetModel
    rgb: SparseControlNetModel
    lora: Mapping[str, Tensor]
    words: Sequence[str] = ()
    old_vae: AutoencoderKL | None = None


def write_parts(weights: AnimateDiffWeights, parts: DemoParts) -> None:
    """Write every part where `weights` says, in the published layouts."""
    base, vae, adapter = weights.base.folder, weights.vae and weights.vae.folder, weights.motion_adapter.folder
    scribble, rgb = weights.sparsectrl_scribble.folder, weights.sparsectrl_rgb.folder
    assert base and vae and adapter and scribble and rgb and weights.lora.file  # noqa: PT018  (for the type checker)
    write_json(base / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    write_json(base / "scheduler" / "scheduler_config.json", _SCHEDULER)
    write_tokenizer(base / "tokenizer", parts.words)
    if parts.words:
        write_json(base / KNOWN_WORDS, {"words": list(parts.words)})
    _write_text_encoder(base / "text_encoder", parts.text_encoder)
    parts.unet.save_pretrained(base / "unet")
    if parts.old_vae is not None:
        _write_old_vae(base / "vae", parts.old_vae)
    parts.vae.save_pretrained(vae)
    parts.motion_adapter.save_pretrained(adapter)
    save_file(dict(parts.lora), adapter / weights.lora.file)
    parts.scribble.save_pretrained(scribble)
    parts.rgb.save_pretrained(rgb)


def _write_all(weights: AnimateDiffWeights, size: DemoSize) -> None:
    text_encoder, unet, old_vae = live(_text_encoder()), live(_unet(size)), live(_vae(size))
    vae, adapter, lora = live(_vae(size)), live(_motion_adapter(size)), kohya_lora(unet.state_dict())
    scribble, rgb = live(_sparse_control(size, simplified=False)), live(_sparse_control(size, simplified=True))
    write_parts(weights, DemoParts(text_encoder, unet, vae, adapter, scribble, rgb, lora, old_vae=old_vae))


def kohya_lora(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA on every attention projection and one 3x3 convolution, in kohya's key style, with alphas."""
    lora: dict[str, Tensor] = {}
    for key, weight in weights.items():
        if (
            any(part in key for part in ("attn1.to_", "attn2.to_", "proj_in.weight", "resnets.0.conv1.weight"))
            and weight.ndim > 1
        ):
            name = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
            lora[f"{name}.lora_down.weight"] = torch.randn(_RANK, *weight.shape[1:]) * 0.1
            lora[f"{name}.lora_up.weight"] = torch.randn(weight.shape[0], _RANK, *(1,) * (weight.ndim - 2)) * 0.1
            lora[f"{name}.alpha"] = torch.tensor(2.0)
    return lora


def _unet(size: DemoSize) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=size.latent,
        block_out_channels=size.channels,
        layers_per_block=size.layers,
        cross_attention_dim=_WIDTH,
        attention_head_dim=_HEADS,
        norm_num_groups=_GROUPS,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def _motion_adapter(size: DemoSize) -> MotionAdapter:
    return MotionAdapter(
        block_out_channels=size.channels,
        motion_layers_per_block=size.layers,
        motion_num_attention_heads=_HEADS,
        motion_norm_num_groups=_GROUPS,
        motion_max_seq_length=32,
        use_motion_mid_block=True,
    )


def _sparse_control(size: DemoSize, simplified: bool) -> SparseControlNetModel:
    return SparseControlNetModel(
        conditioning_channels=4 if simplified else 3,
        use_simplified_condition_embedding=simplified,
        conditioning_embedding_out_channels=(4, 8, 8, 16),  # three stride-2 stages: 64 pixels become 8
        block_out_channels=size.channels,
        layers_per_block=size.layers,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        cross_attention_dim=_WIDTH,
        attention_head_dim=_HEADS,
        motion_num_attention_heads=_HEADS,
        norm_num_groups=_GROUPS,
    )


def _vae(size: DemoSize) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=size.vae_channels,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=8 * size.latent,
    )


def _write_old_vae(folder: Path, vae: AutoencoderKL) -> None:
    """With its attention under the names that SD 1.5's file still has."""
    vae.save_config(folder)
    new_to_old = {new: old for old, new in OLD_VAE_NAMES.items()}
    tensors = {}
    for key, value in vae.state_dict().items():
        for new, old in new_to_old.items():
            key = key.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
        tensors[key] = value.contiguous()
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")


def _text_encoder() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=TOKENS,
            hidden_size=_WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=TOKENS - 2,
            eos_token_id=TOKENS - 1,
            pad_token_id=TOKENS - 1,
        )
    )


def _write_text_encoder(folder: Path, model: CLIPTextModel) -> None:
    write_json(folder / "config.json", model.config.to_dict())
    tensors = {f"text_model.{key}": value.contiguous() for key, value in model.state_dict().items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]  # as in SD 1.5's file
    save_file(tensors, folder / "model.safetensors")
