"""The UNets whose exports are tested, equal in every process, and functions that export them in a process beside the tests.

Symbolic shapes cost half a minute per graph, and more with every layer, so these UNets are the smallest with every layer type.
"""

import warnings
from pathlib import Path

import torch
from diffusers import UNetMotionModel

from engines.animatediff.call import motion_call
from engines.animatediff.unet import MotionUNet
from engines.backends.trt.export import export_onnx
from engines.backends.unet_call import UNetCall
from engines.controlnext.call import svd_call
from engines.controlnext.checkpoint import load_unet
from engines.controlnext.config import ControlNeXtConfig, ControlNeXtWeights
from engines.controlnext.unet import SVDUNet
from engines.demo import SEED, live


def motion_unet() -> MotionUNet:
    """The demo's UNet, but with one layer per block where the demo has two."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        source = UNetMotionModel(
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
        return MotionUNet(live(source).requires_grad_(False).eval())


def svd_unet(folder: Path) -> SVDUNet:
    """The demo's UNet, with the weights in `folder`; it has one layer per block."""
    return load_unet(ControlNeXtConfig(weights=ControlNeXtWeights.demo(folder)))


def call_of(unet: MotionUNet | SVDUNet) -> UNetCall:
    """The UNet's call; with guidance if one call computes both halves."""
    return motion_call(unet, halves=2) if isinstance(unet, MotionUNet) else svd_call(unet)


def export_motion(path: Path) -> Path:
    """Writes the graph to `path` and returns it."""
    return _export(motion_unet(), path)


def export_svd(folder: Path, path: Path) -> Path:
    """Likewise."""
    return _export(svd_unet(folder), path)


def _export(unet: MotionUNet | SVDUNet, path: Path) -> Path:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's warnings about its own deprecations
        export_onnx(call_of(unet), path)
    return path
