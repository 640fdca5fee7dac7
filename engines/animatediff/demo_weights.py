"""Tiny checkpoints in the hub's layouts: random but seeded, so that everything runs without a hub and without a GPU.

They give coloured noise, not videos; their purpose is to be loaded, moved and compared like the real ones. Sizes:
`video-models.md` section 8 (64x64 pixels, 16 frames, about 16 MB in all).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, MotionAdapter, SparseControlNetModel, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from engines.animatediff.checkpoint import OLD_VAE_NAMES
from engines.animatediff.config import AnimateDiffWeights
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
    """channels: of the UNet's levels. latent: height and width in latents of 8 pixels. vae_channels: of the VAE's levels."""

    channels: tuple[int, int] = (32, 64)
    latent: int = 8
    vae_channels: tuple[int, int, int, int] = (8, 8, 16, 16)


TINY = DemoSize()


def write_demo_weights(folder: Path, size: DemoSize = TINY) -> AnimateDiffWeights:
    """Write all parts to `folder`, completely or not at all, unless it exists. Returns where each part is."""
    write_once(folder, lambda draft: _write_all(AnimateDiffWeights.demo(draft), size))
    return AnimateDiffWeights.demo(folder)


def _write_all(weights: AnimateDiffWeights, size: DemoSize) -> None:
    base, vae, adapter = weights.base.folder, weights.vae and weights.vae.folder, weights.motion_adapter.folder
    scribble, rgb = weights.sparsectrl_scribble.folder, weights.sparsectrl_rgb.folder
    assert base and vae and adapter and scribble and rgb and weights.lora.file  # noqa: PT018  (for the type checker)
    write_json(base / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    write_json(base / "scheduler" / "scheduler_config.json", _SCHEDULER)
    _write_tokenizer(base / "tokenizer")
    _write_text_encoder(base / "text_encoder")
    unet = live(_unet(size))
    unet.save_pretrained(base / "unet")
    _write_old_vae(base / "vae", size)
    live(_vae(size)).save_pretrained(vae)
    live(_motion_adapter(size)).save_pretrained(adapter)
    save_file(kohya_lora(unet.state_dict()), adapter / weights.lora.file)
    live(_sparse_control(size, simplified=False)).save_pretrained(scribble)
    live(_sparse_control(size, simplified=True)).save_pretrained(rgb)


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
        layers_per_block=2,
        cross_attention_dim=_WIDTH,
        attention_head_dim=_HEADS,
        norm_num_groups=_GROUPS,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def _motion_adapter(size: DemoSize) -> MotionAdapter:
    return MotionAdapter(
        block_out_channels=size.channels,
        motion_layers_per_block=2,
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


def _write_old_vae(folder: Path, size: DemoSize) -> None:
    """The base's own VAE, with its attention under the names that SD 1.5's file still has."""
    vae = live(_vae(size))
    vae.save_config(folder)
    new_to_old = {new: old for old, new in OLD_VAE_NAMES.items()}
    tensors = {}
    for key, value in vae.state_dict().items():
        for new, old in new_to_old.items():
            key = key.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
        tensors[key] = value.contiguous()
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")


def _write_text_encoder(folder: Path) -> None:
    vocabulary = len(_vocabulary())
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=_WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    write_json(folder / "config.json", config.to_dict())
    state = live(CLIPTextModel(config)).state_dict()
    tensors = {f"text_model.{key}": value.contiguous() for key, value in state.items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]  # as in SD 1.5's file
    save_file(tensors, folder / "model.safetensors")


def _write_tokenizer(folder: Path) -> None:
    """CLIP's byte-level tokenizer without merges: one character, one token."""
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(_vocabulary())})
    (folder / "merges.txt").write_text("#version: 0.2\n")
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special})


def _vocabulary() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, the same marked as a word's end, and two special tokens: 514 entries."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    return [*symbols, *(f"{symbol}</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
