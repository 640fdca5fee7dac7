import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor

from engines.animatediff.call import motion_call
from engines.animatediff.checkpoint import load_unet as load_motion_unet
from engines.animatediff.config import AnimateDiffConfig, AnimateDiffWeights
from engines.animatediff.unet import MotionUNet
from engines.controlnext.call import svd_call
from engines.controlnext.checkpoint import load_unet as load_svd_unet
from engines.controlnext.config import ControlNeXtConfig
from engines.controlnext.demo_weights import write_demo_weights
from engines.controlnext.unet import SVDUNet
from engines.trt.export import export_onnx
from engines.unet_call import UNetCall


@dataclass(frozen=True)
class Exported:
    """A UNet, its call, and the graph of it in a file."""

    unet: MotionUNet | SVDUNet
    call: UNetCall
    path: Path

    @property
    def operators(self) -> list[str]:
        return [node.op_type for node in onnx.load(self.path).graph.node]


@pytest.fixture(scope="session")
def motion(demo_weights: AnimateDiffWeights, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    unet = load_motion_unet(AnimateDiffConfig(weights=demo_weights))
    return exported(unet, motion_call(unet, halves=2), tmp_path_factory.mktemp("onnx") / "motion.onnx")


@pytest.fixture(scope="session")
def svd(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    unet = load_svd_unet(ControlNeXtConfig(weights=write_demo_weights(tmp_path_factory.mktemp("weights") / "controlnext")))
    return exported(unet, svd_call(unet), tmp_path_factory.mktemp("onnx") / "svd.onnx")


def exported(unet: MotionUNet | SVDUNet, call: UNetCall, path: Path) -> Exported:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its own deprecations
        export_onnx(call, path)
    return Exported(unet, call, path)


def randn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator)


def same_shapes(inputs: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return {name: tuple(tensor.shape) for name, tensor in inputs.items()} == dict(shapes)
