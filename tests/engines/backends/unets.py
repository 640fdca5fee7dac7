"""Tiny UNets of both families for compilers and exporters, whose time grows with every layer.

These have every kind of layer about once: where diffusers makes more of a kind, the others are removed.
"""

from typing import Any

import torch
from diffusers import UNetMotionModel, UNetSpatioTemporalConditionModel
from torch import nn

from engines.animatediff.nets.unet import MotionUNet
from engines.controlnext.nets.unet import SVDUNet
from engines.demo.checkpoint import SEED, live


def motion_unet(levels: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> MotionUNet:
    """levels: 1 or 2. With 2, the middle block too has attention over the text and over frames, at the smaller size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        unet: Any = UNetMotionModel(
            block_out_channels=(32,) * levels,
            layers_per_block=1,
            cross_attention_dim=32,
            num_attention_heads=4,
            norm_num_groups=8,
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion")[:levels],
            up_block_types=("UpBlockMotion",) * levels,
            motion_num_attention_heads=4,
            use_motion_mid_block=True,
        )
        middle = unet.mid_block
        for parts in (middle.resnets, middle.attentions, middle.motion_modules):
            del parts[levels - 1 :]
        for block in unet.down_blocks[1:]:
            del block.resnets[:], block.motion_modules[:]
        for block in unet.up_blocks:
            del block.motion_modules[:]
        for block in unet.up_blocks[:-1]:
            del block.resnets[1]
        return MotionUNet(_ready(unet, device, dtype))


def svd_unet(device: str = "cpu", dtype: torch.dtype = torch.float32) -> SVDUNet:
    """One level with one transformer, and no middle block; several sizes are as in `motion_unet`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        unet: Any = UNetSpatioTemporalConditionModel(
            block_out_channels=(32,),
            layers_per_block=1,
            cross_attention_dim=32,
            num_attention_heads=(2,),
            down_block_types=("CrossAttnDownBlockSpatioTemporal",),
            up_block_types=("UpBlockSpatioTemporal",),
            addition_time_embed_dim=32,
            projection_class_embeddings_input_dim=96,
        )
        del unet.mid_block.resnets[:], unet.mid_block.attentions[:], unet.up_blocks[0].resnets[1]
        return SVDUNet(_ready(unet, device, dtype))


def _ready(unet: nn.Module, device: str, dtype: torch.dtype) -> nn.Module:
    return nn.Module.to(live(unet), device, dtype).eval().requires_grad_(False)
