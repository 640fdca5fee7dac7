"""Loads modules from the hub's layouts: SD 1.5 or a fine-tune, a VAE, AnimateLCM's adapter and LoRA, SparseCtrl.

Every loader raises `WeightsError` if the config asks for something that our layers do not compute, or if the tensors do not
fit exactly. Layouts: `video-models.md` section 1A.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SparseControlNetModel, UNetMotionModel
from diffusers.models.embeddings import SinusoidalPositionalEmbedding
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from engines.animatediff.config import AnimateDiffConfig, AnimateDiffWeights
from engines.animatediff.nets.sparse_control import SparseControl
from engines.animatediff.nets.unet import MotionUNet
from engines.animatediff.spec import ControlType
from engines.checkpoints.source import Source
from engines.checkpoints.weights import (
    Tensors,
    build,
    file_patterns,
    fold_lora,
    load_strict,
    locate,
    read_json,
    read_lora,
    read_tensors,
    require,
    torch_dtype,
    union,
)
from engines.errors import WeightsError
from engines.sampling import NoiseSchedule, linear_schedule

_STEM = "diffusion_pytorch_model"

_UNET_NEEDS: dict[str, Any] = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "class_embed_type": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "only_cross_attention": False,
    "resnet_time_scale_shift": "default",
    "time_cond_proj_dim": None,
    "upcast_attention": False,
}
_CONTROL_NEEDS: dict[str, Any] = {
    "concat_conditioning_mask": True,
    "controlnet_conditioning_channel_order": "rgb",
    "global_pool_conditions": False,
}
_SCHEDULER_NEEDS: dict[str, Any] = {"clip_sample": False, "thresholding": False, "rescale_betas_zero_snr": False}

OLD_VAE_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names of the VAE's attention layers in checkpoints from before diffusers 0.18 (such as SD 1.5's own), and their names today."""

KNOWN_WORDS = "words.json"
"""Lists the words that a demo model knows; a file that published checkpoints do not have."""


@dataclass(frozen=True)
class ClipShape:
    """Shapes that the base checkpoint fixes. height, width in pixels; scale: pixels per latent."""

    height: int
    width: int
    scale: int


def weights_of(config: AnimateDiffConfig) -> AnimateDiffWeights:
    """The configured folders or repos. Raises `WeightsError` for "demo", which the settings must have replaced by its folders."""
    if not isinstance(config.weights, AnimateDiffWeights):
        raise WeightsError('"demo" names no folder; see AnimateDiffWeights.demo')
    return config.weights


def clip_shape(config: AnimateDiffConfig) -> ClipShape:
    """The size of a clip: as configured, or the base UNet's own. Raises `WeightsError` for a size the UNet cannot halve."""
    weights = weights_of(config)
    unet = read_json(_base(weights.base) / "unet" / "config.json")
    scale = 2 ** (len(_vae_config(weights)["block_out_channels"]) - 1)
    height, width = (size or unet["sample_size"] * scale for size in (config.height, config.width))
    multiple = scale * 2 ** (len(unet["block_out_channels"]) - 1)
    if height % multiple or width % multiple:
        raise WeightsError(f"{width}x{height} is not a multiple of {multiple} pixels")
    return ClipShape(height, width, scale)


def load_tokenizer(weights: AnimateDiffWeights) -> CLIPTokenizer:
    """CLIP's tokenizer."""
    return CLIPTokenizer.from_pretrained(_base(weights.base) / "tokenizer")


def load_known_words(weights: AnimateDiffWeights) -> tuple[str, ...]:
    """The words that the model knows, if it is a demo model, in its grammar's order; else nothing."""
    path = _base(weights.base) / KNOWN_WORDS
    return tuple(read_json(path)["words"]) if path.is_file() else ()


def load_text_encoder(weights: AnimateDiffWeights, dtype: torch.dtype) -> CLIPTextModel:
    """CLIP's text encoder. `position_ids`, a buffer in old checkpoints, is a constant and is not loaded."""
    folder = _base(weights.base) / "text_encoder"
    stored = read_tensors(folder, "model", weights.base.variant)
    tensors = {key.removeprefix("text_model."): value for key, value in stored.items() if not key.endswith(".position_ids")}
    model = CLIPTextModel(CLIPTextConfig(**read_json(folder / "config.json")))
    load_strict(model, tensors, str(folder), dtype)
    return model


def load_vae(weights: AnimateDiffWeights, dtype: torch.dtype) -> AutoencoderKL:
    """The base checkpoint's VAE, or the one that replaces it."""
    source, folder = _vae(weights)
    stored = read_tensors(folder, _STEM, source.variant)
    model = build(lambda: AutoencoderKL.from_config(_vae_config(weights)))
    load_strict(model, {_current_vae_name(key): value for key, value in stored.items()}, str(folder), dtype)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it


def load_unet(config: AnimateDiffConfig) -> MotionUNet:
    """SD 1.5's UNet with the adapter's motion modules and the LoRA folded in (5o)."""
    source = load_diffusers_unet(config)
    if not source.config.motion_max_seq_length >= config.num_frames:
        raise WeightsError(
            f"the motion modules have positions for {source.config.motion_max_seq_length} frames, not {config.num_frames}"
        )
    return MotionUNet(source).to(config.device)


def load_diffusers_unet(config: AnimateDiffConfig) -> UNetMotionModel:
    """The same weights in diffusers' own class, on the host."""
    weights = weights_of(config)
    folder = _base(weights.base) / "unet"
    adapter_folder = locate(weights.motion_adapter, file_patterns(_STEM, weights.motion_adapter.variant))
    unet_config, adapter_config = read_json(folder / "config.json"), read_json(adapter_folder / "config.json")
    where = f"{folder} with {adapter_folder}"
    require(unet_config, _UNET_NEEDS, str(folder))
    require(adapter_config, {"conv_in_channels": None}, str(adapter_folder))
    tensors = union(
        where,
        read_tensors(folder, _STEM, weights.base.variant),
        read_tensors(adapter_folder, _STEM, weights.motion_adapter.variant),
    )
    lora, alpha = read_lora(weights.lora)
    fold_lora(tensors, lora, weights.lora_scale, str(weights.lora.file), alpha)
    model = build(lambda: UNetMotionModel.from_config(_motion_config(unet_config, adapter_config)))
    _load_with_positions(model, tensors, where, torch_dtype(config.dtype))
    return model


def load_sparse_control(config: AnimateDiffConfig, kind: ControlType) -> SparseControl:
    """SparseCtrl for scribble or for RGB keyframes."""
    return SparseControl(load_diffusers_sparse_control(config, kind)).to(config.device)


def load_diffusers_sparse_control(config: AnimateDiffConfig, kind: ControlType) -> SparseControlNetModel:
    """The same weights in diffusers' own class, on the host."""
    weights = weights_of(config)
    source = weights.sparsectrl_scribble if kind == "scribble" else weights.sparsectrl_rgb
    folder = locate(source, file_patterns(_STEM, source.variant))
    control_config = read_json(folder / "config.json")
    simplified = kind == "rgb"  # rgb keyframes come as latents, scribbles as pixels
    require(control_config, _UNET_NEEDS | _CONTROL_NEEDS | {"use_simplified_condition_embedding": simplified}, str(folder))
    model = build(lambda: SparseControlNetModel.from_config(control_config))
    _load_with_positions(model, read_tensors(folder, _STEM, source.variant), str(folder), torch_dtype(config.dtype))
    return model


def load_schedule(weights: AnimateDiffWeights) -> NoiseSchedule:
    """The noise schedule: the base's beta range and prediction type. The betas are always linear, as AnimateLCM was trained."""
    path = _base(weights.base) / "scheduler" / "scheduler_config.json"
    config = read_json(path)
    require(config, _SCHEDULER_NEEDS, str(path))
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise WeightsError(f"{path}: prediction_type {prediction_type!r} is not known")
    return linear_schedule(
        config.get("beta_start", 0.00085), config.get("beta_end", 0.012), config.get("num_train_timesteps", 1000), prediction_type
    )


def _base(source: Source) -> Path:
    patterns = ["tokenizer/*", "scheduler/*"]
    for part, stem in (("unet", _STEM), ("vae", _STEM), ("text_encoder", "model")):
        patterns += file_patterns(stem, source.variant, prefix=f"{part}/")
    return locate(source, patterns)


def _vae(weights: AnimateDiffWeights) -> tuple[Source, Path]:
    if weights.vae is not None:
        return weights.vae, locate(weights.vae, file_patterns(_STEM, weights.vae.variant))
    return weights.base, _base(weights.base) / "vae"


def _vae_config(weights: AnimateDiffWeights) -> dict[str, Any]:
    return read_json(_vae(weights)[1] / "config.json")


def _current_vae_name(key: str) -> str:
    old = re.fullmatch(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)", key)
    return f"{old[1]}.{OLD_VAE_NAMES[old[2]]}.{old[3]}" if old else key


def _motion_config(unet: Mapping[str, Any], adapter: Mapping[str, Any]) -> dict[str, Any]:
    """The config of `UNetMotionModel` from a 2D UNet's and an adapter's. Keys that both UNet classes have are passed on."""
    names = {"CrossAttnDownBlock2D": "CrossAttnDownBlockMotion", "DownBlock2D": "DownBlockMotion"}
    names |= {"CrossAttnUpBlock2D": "CrossAttnUpBlockMotion", "UpBlock2D": "UpBlockMotion"}
    try:
        return {
            **{key: value for key, value in unet.items() if key in UNetMotionModel.__init__.__wrapped__.__annotations__},
            "down_block_types": [names[name] for name in unet["down_block_types"]],
            "up_block_types": [names[name] for name in unet["up_block_types"]],
            # SD 1.5 stores the number of heads under attention_head_dim
            "num_attention_heads": unet.get("num_attention_heads") or unet["attention_head_dim"],
            "motion_num_attention_heads": adapter["motion_num_attention_heads"],
            "motion_max_seq_length": adapter["motion_max_seq_length"],
            "use_motion_mid_block": adapter["use_motion_mid_block"],
            "temporal_transformer_layers_per_block": adapter.get("motion_transformer_layers_per_block", 1),
            "temporal_transformer_layers_per_mid_block": adapter.get("motion_transformer_layers_per_mid_block", 1),
        }
    except KeyError as exc:
        raise WeightsError(f"the UNet's or the adapter's config lacks a key or names an unknown block: {exc}") from exc


def _load_with_positions(model: torch.nn.Module, tensors: Tensors, where: str, dtype: torch.dtype) -> None:
    """Like `load_strict`, but computes the motion modules' position tables if the checkpoint leaves them out."""
    load_strict(model, tensors, where, dtype, optional=r"pos_embed\.pe$")
    for module in model.modules():
        if isinstance(module, SinusoidalPositionalEmbedding) and module.pe.is_meta:
            _, length, channels = module.pe.shape
            module.pe = SinusoidalPositionalEmbedding(channels, length).pe.to(dtype)
