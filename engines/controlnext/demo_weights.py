"""Tiny checkpoints in the published layouts: random but seeded, so that everything runs without a hub and without a GPU.

They give coloured noise, not people; their purpose is to be loaded, moved and compared like the real ones. The pose models are
made by hand and do find the puppet of `demo_pose`. Sizes: `video-models.md` section 8, about 12 MB in all.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from engines.controlnext.config import ControlNeXtWeights
from engines.controlnext.demo_pose import write_demo_pose
from engines.controlnext.nets.control_net import ControlNet, ControlNetSize
from engines.demo.checkpoint import live, write_json, write_once

_WIDTH = 32  # of the image embedding
_TIME_WIDTH = 32

_TINY_CONTROL = ControlNetSize(stem=(16, 16, 32), levels=(32, 64), out=32, time=32)

_SCHEDULER = {  # SVD XT 1.1's own
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "sigma_max": 700.0,
    "sigma_min": 0.002,
    "timestep_spacing": "leading",
    "timestep_type": "continuous",
    "use_karras_sigmas": True,
}


@dataclass(frozen=True)
class DemoSize:
    """channels: of the UNet's two levels, multiples of 32: SVD fixes 32 norm groups. control: widths; out must be channels[0]."""

    channels: tuple[int, int] = (32, 64)
    heads: tuple[int, int] = (2, 4)
    control: ControlNetSize = _TINY_CONTROL


TINY = DemoSize()


def write_demo_weights(folder: Path, size: DemoSize = TINY) -> ControlNeXtWeights:
    """Write all parts to `folder`, completely or not at all, unless it exists. Returns where each part is."""
    write_once(folder, lambda draft: _write_all(ControlNeXtWeights.demo(draft), size))
    return ControlNeXtWeights.demo(folder)


def _write_all(weights: ControlNeXtWeights, size: DemoSize) -> None:
    write_parts(
        weights, live(_unet(size)), live(ControlNet(size.control)), size.control, live(_vae()), live(image_encoder(_WIDTH))
    )


def write_parts(
    weights: ControlNeXtWeights,
    unet: UNetSpatioTemporalConditionModel,
    control: ControlNet,
    control_size: ControlNetSize,
    vae: AutoencoderKLTemporalDecoder,
    image_encoder: CLIPVisionModelWithProjection,
) -> None:
    """Write every part where `weights` says, in the published layouts, and the pose models made by hand."""
    base, net, pose = weights.base.folder, weights.unet.folder, weights.pose.folder
    assert base and net and pose and weights.unet.file and weights.control.file  # noqa: PT018  (for the type checker)
    write_json(base / "model_index.json", {"_class_name": "StableVideoDiffusionPipeline"})
    write_json(base / "scheduler" / "scheduler_config.json", _SCHEDULER)
    unet.save_config(base / "unet")  # of the base's UNet only the config is read
    vae.save_pretrained(base / "vae")
    image_encoder.save_pretrained(base / "image_encoder")
    net.mkdir()
    _save(unet, net / weights.unet.file)
    _save(control, net / weights.control.file)
    write_json(net / Path(weights.control.file).with_suffix(".json").name, asdict(control_size))
    write_demo_pose(pose)


def _save(module: Any, path: Path) -> None:
    save_file({key: value.contiguous() for key, value in module.state_dict().items()}, path)


def _unet(size: DemoSize) -> UNetSpatioTemporalConditionModel:
    return UNetSpatioTemporalConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=size.channels,
        num_attention_heads=size.heads,
        layers_per_block=1,
        cross_attention_dim=_WIDTH,
        addition_time_embed_dim=_TIME_WIDTH,
        projection_class_embeddings_input_dim=3 * _TIME_WIDTH,
    )


def _vae() -> AutoencoderKLTemporalDecoder:
    return AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        sample_size=64,
    )


def image_encoder(width: int) -> CLIPVisionModelWithProjection:
    """A tiny one with random weights. width: of its embeddings."""
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=224,
            patch_size=56,
            projection_dim=width,
        )
    )
