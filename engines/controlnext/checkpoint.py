"""Loads modules from the published layouts: SVD XT's folders, ControlNeXt's UNet and net, DWPose's ONNX files.

Every loader raises `WeightsError` if the config asks for something that our layers do not compute, or if the tensors do not
fit exactly. Layouts: `video-models.md` section 1B.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from engines.checkpoints.weights import (
    build,
    file_patterns,
    load_strict,
    locate,
    read_json,
    read_source_file,
    read_tensors,
    torch_dtype,
)
from engines.controlnext.config import DETECTOR_FILE, POSE_FILE, ControlNeXtConfig, ControlNeXtWeights, weights_of
from engines.controlnext.nets.control_net import ControlNet, ControlNetSize
from engines.controlnext.nets.unet import SVDUNet
from engines.errors import WeightsError

_STEM = "diffusion_pytorch_model"


def size_multiple(weights: ControlNeXtWeights) -> int:
    """Height and width must be multiples of this many pixels: 64 as published, as the VAE divides by 8 and the UNet by 8 more."""
    unet = read_json(_base(weights) / "unet" / "config.json")
    return latent_scale(weights) * 2 ** (len(unet["block_out_channels"]) - 1)


def latent_scale(weights: ControlNeXtWeights) -> int:
    """Pixels per latent, in height and in width."""
    return 2 ** (len(read_json(_base(weights) / "vae" / "config.json")["block_out_channels"]) - 1)


def load_unet(config: ControlNeXtConfig) -> SVDUNet:
    """The fully fine-tuned UNet."""
    return SVDUNet(load_diffusers_unet(config)).to(config.device)


def load_diffusers_unet(config: ControlNeXtConfig) -> UNetSpatioTemporalConditionModel:
    """The same weights in diffusers' own class, on the host. The file must hold all its 1428 keys: v2 replaces every one."""
    weights = weights_of(config)
    unet_config = read_json(_base(weights) / "unet" / "config.json")
    model = build(lambda: UNetSpatioTemporalConditionModel.from_config(unet_config))
    load_strict(model, read_source_file(weights.unet), str(weights.unet.file), torch_dtype(config.dtype))
    return model


def load_control_net(config: ControlNeXtConfig) -> ControlNet:
    """ControlNeXt's net, as wide as published unless a JSON file of the same name beside it says otherwise."""
    weights = weights_of(config)
    tensors = read_source_file(weights.control)
    sizes = str(Path(str(weights.control.file)).with_suffix(".json"))
    size = _control_size(locate(weights.control, [sizes]) / sizes)
    model: Any = build(lambda: ControlNet(size))
    load_strict(model, tensors, str(weights.control.file), torch_dtype(config.dtype))
    channels_last: ControlNet = model.to(memory_format=torch.channels_last)
    return channels_last.to(config.device)


def load_vae(config: ControlNeXtConfig, dtype: torch.dtype) -> AutoencoderKLTemporalDecoder:
    """SVD's VAE, whose decoder sees several frames, on the host."""
    weights = weights_of(config)
    folder = _base(weights) / "vae"
    model = build(lambda: AutoencoderKLTemporalDecoder.from_config(read_json(folder / "config.json")))
    load_strict(model, read_tensors(folder, _STEM, weights.base.variant), str(folder), dtype)
    return model


def load_image_encoder(config: ControlNeXtConfig) -> CLIPVisionModelWithProjection:
    """CLIP-H's image encoder. `position_ids`, a buffer in old checkpoints, is a constant and is not loaded."""
    weights = weights_of(config)
    folder = _base(weights) / "image_encoder"
    stored = read_tensors(folder, "model", weights.base.variant)
    tensors = {key: value for key, value in stored.items() if not key.endswith(".position_ids")}
    model: Any = build(lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**read_json(folder / "config.json"))))
    load_strict(model, tensors, str(folder), torch_dtype(config.dtype))
    embeddings = model.vision_model.embeddings
    embeddings.position_ids = torch.arange(embeddings.num_positions)[None]  # not in the checkpoint, so still on the meta device
    return model.to(config.device)


def pose_folder(weights: ControlNeXtWeights) -> Path:
    """The folder with DWPose's two files."""
    return locate(weights.pose, [DETECTOR_FILE, POSE_FILE])


def _base(weights: ControlNeXtWeights) -> Path:
    variant = weights.base.variant
    patterns = ["unet/config.json"]
    for part, stem in (("vae", _STEM), ("image_encoder", "model")):
        patterns += file_patterns(stem, variant, prefix=f"{part}/")
    return locate(weights.base, patterns)


def _control_size(path: Path) -> ControlNetSize:
    if not path.is_file():
        return ControlNetSize()
    sizes: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in read_json(path).items()}
    try:
        return ControlNetSize(**sizes)
    except TypeError as exc:
        raise WeightsError(f"{path} does not describe a control net: {exc}") from exc
