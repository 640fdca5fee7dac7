"""The nets of both models, ours and diffusers', with the same random but seeded weights: benchmarks need no checkpoint.

Each side has its own copy of the weights: ours are in channels-last memory, diffusers' in the layout in which it loads them.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    SparseControlNetModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
)
from torch import nn

import engines.animatediff.published as animatediff
import engines.controlnext.published as controlnext
from engines.animatediff.nets.sparse_control import SparseControl
from engines.animatediff.nets.unet import MotionUNet
from engines.controlnext.nets.control_net import ControlNet, ControlNetSize
from engines.controlnext.nets.unet import Control, SVDUNet, inject
from engines.demo.checkpoint import SEED, live
from engines.diffusion.vae import fuse

_TINY_MOTION: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "motion_num_attention_heads": 4,
    "norm_num_groups": 8,
}
_TINY_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "block_out_channels": (32, 32, 32, 32),
    "layers_per_block": 1,
    "latent_channels": 4,
}


PUBLISHED_CONTROL = ControlNetSize()


@dataclass(frozen=True)
class AnimateDiffSize:
    """unet, control, vae: arguments of diffusers' classes. side: height and width of the latents."""

    unet: Mapping[str, Any] = field(default_factory=lambda: animatediff.UNET)
    control: Mapping[str, Any] = field(default_factory=lambda: animatediff.SPARSE_CONTROL)
    vae: Mapping[str, Any] = field(default_factory=lambda: animatediff.VAE)
    side: int = 64
    frames: int = 16
    text_width: int = 768
    steps: int = 4


@dataclass(frozen=True)
class ControlNeXtSize:
    """unet, vae: arguments of diffusers' classes. height, width: of the latents. window: frames of a call. frames: of a job."""

    unet: Mapping[str, Any] = field(default_factory=lambda: controlnext.UNET)
    vae: Mapping[str, Any] = field(default_factory=lambda: controlnext.VAE)
    control: ControlNetSize = PUBLISHED_CONTROL
    height: int = 128
    width: int = 72
    window: int = 24
    frames: int = 25
    image_width: int = 1024
    steps: int = 25


TINY_ANIMATEDIFF = AnimateDiffSize(
    unet=_TINY_MOTION | {"num_attention_heads": 4, "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion")},
    control=_TINY_MOTION
    | {
        "attention_head_dim": 4,
        "conditioning_channels": 3,
        "use_simplified_condition_embedding": False,
        "conditioning_embedding_out_channels": (4, 8, 8, 16),
    },
    vae=_TINY_VAE | {"up_block_types": ("UpDecoderBlock2D",) * 4},
    side=4,
    text_width=32,
    steps=2,
)
TINY_CONTROLNEXT = ControlNeXtSize(
    unet={
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        "block_out_channels": (32, 64),
        "num_attention_heads": (2, 4),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "addition_time_embed_dim": 32,
        "projection_class_embeddings_input_dim": 96,
    },
    vae=_TINY_VAE,
    control=ControlNetSize(stem=(16, 16, 32), levels=(32, 64), out=32, time=32),
    height=4,
    width=4,
    window=4,
    frames=5,
    image_width=32,
    steps=2,
)


@dataclass(frozen=True)
class AnimateDiffNets:
    """diffusers' nets are named their_*; the others are ours. vae is in channels-last memory."""

    size: AnimateDiffSize
    their_unet: Any
    their_control: Any
    their_vae: Any
    unet: MotionUNet
    control: SparseControl
    vae: Any


@dataclass(frozen=True)
class ControlNeXtNets:
    """their_unet is diffusers', unet is ours. Both sides use the same control net and VAE.

    injected: every call of their_unet adds the value under "control" after its first block, as in the published code.
    """

    size: ControlNeXtSize
    their_unet: Any
    injected: dict[str, Control | None]
    unet: SVDUNet
    control: ControlNet
    vae: Any


def animatediff_nets(size: AnimateDiffSize, device: torch.device, dtype: torch.dtype) -> AnimateDiffNets:
    """SD 1.5 with motion modules, SparseCtrl for scribbles, the VAE."""
    unet, control, vae = (
        _built(make, device, dtype)
        for make in (
            lambda: UNetMotionModel(**size.unet),
            lambda: SparseControlNetModel(**size.control),
            lambda: AutoencoderKL(**size.vae),
        )
    )
    ours = MotionUNet(copy.deepcopy(unet)), SparseControl(copy.deepcopy(control))
    our_vae = copy.deepcopy(vae).to(memory_format=torch.channels_last)
    fuse(our_vae.decoder)
    return AnimateDiffNets(size, unet, control, vae, *ours, our_vae)


def controlnext_nets(size: ControlNeXtSize, device: torch.device, dtype: torch.dtype) -> ControlNeXtNets:
    """SVD's UNet, ControlNeXt's net, the temporal VAE."""
    unet = _built(lambda: UNetSpatioTemporalConditionModel(**size.unet), device, dtype)
    control = _built(lambda: ControlNet(size.control), device, dtype)
    vae = _built(lambda: AutoencoderKLTemporalDecoder(**size.vae), device, dtype)
    ours = SVDUNet(copy.deepcopy(unet))
    return ControlNeXtNets(size, unet, _injecting(unet), ours, control.to(memory_format=torch.channels_last), vae)


def _injecting(unet: Any) -> dict[str, Control | None]:
    injected: dict[str, Control | None] = {"control": None}

    def hook(_module: Any, _inputs: Any, outputs: Any) -> Any:
        control = injected["control"]
        return outputs if control is None else (inject(outputs[0], control), *outputs[1:])  # not into the skips

    unet.down_blocks[0].register_forward_hook(hook)
    return injected


def _built(make: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> Any:
    torch.manual_seed(SEED)
    with torch.device(device):  # initialised on the device where it is used: a minute less than on a host
        module = live(make())
    return nn.Module.to(module, device, dtype).eval().requires_grad_(False)  # diffusers' own `to` warns of half precision
