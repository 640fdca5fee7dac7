"""The UNets whose exports are tested.

Symbolic shapes cost half a minute a graph, more with every layer: so these are the smallest that have every kind of layer.
"""

import torch
from diffusers import UNetMotionModel, UNetSpatioTemporalConditionModel
from torch import nn

from engines.animatediff.nets.unet import MotionUNet
from engines.controlnext.nets.unet import SVDUNet
from engines.demo.checkpoint import SEED, live


def motion_unet() -> MotionUNet:
    """Its blocks above the middle have no attention over the text: it is that of those below."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return MotionUNet(
            _ready(
                UNetMotionModel(
                    block_out_channels=(32, 64),
                    layers_per_block=1,
                    cross_attention_dim=32,
                    num_attention_heads=4,
                    norm_num_groups=8,
                    down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
                    up_block_types=("UpBlockMotion", "UpBlockMotion"),
                    motion_num_attention_heads=4,
                    use_motion_mid_block=True,
                )
            )
        )


def svd_unet() -> SVDUNet:
    """Likewise, and of one level: those of several are sampled as in `motion_unet`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return SVDUNet(
            _ready(
                UNetSpatioTemporalConditionModel(
                    block_out_channels=(32,),
                    layers_per_block=1,
                    cross_attention_dim=32,
                    num_attention_heads=(2,),
                    down_block_types=("CrossAttnDownBlockSpatioTemporal",),
                    up_block_types=("UpBlockSpatioTemporal",),
                    addition_time_embed_dim=32,
                    projection_class_embeddings_input_dim=96,
                )
            )
        )


def _ready(unet: nn.Module) -> nn.Module:
    return live(unet).requires_grad_(False).eval()
