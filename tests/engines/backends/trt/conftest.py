import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor

from engines.animatediff.call import motion_call
from engines.animatediff.nets.unet import MotionUNet
from engines.backends.trt.export import export_onnx
from engines.backends.unet_call import UNetCall
from engines.controlnext.call import svd_call
from engines.controlnext.nets.unet import SVDUNet
from tests.engines.backends.unets import motion_unet, svd_unet


@dataclass(frozen=True)
class Exported:
    """A UNet, its call, and the file with its ONNX graph."""

    unet: MotionUNet | SVDUNet
    call: UNetCall
    path: Path

    @property
    def operators(self) -> list[str]:
        return [node.op_type for node in onnx.load(self.path).graph.node]


@pytest.fixture(scope="session")
def motion(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """With guidance: one call has both halves."""
    unet = motion_unet(levels=2)
    return exported(unet, motion_call(unet, halves=2), tmp_path_factory.mktemp("motion"))


@pytest.fixture(scope="session")
def svd(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    unet = svd_unet()
    return exported(unet, svd_call(unet), tmp_path_factory.mktemp("svd"))


def exported(unet: MotionUNet | SVDUNet, call: UNetCall, folder: Path) -> Exported:
    path = folder / "unet.onnx"
    with warnings.catch_warnings(), torch.inference_mode(False):
        warnings.simplefilter("ignore")  # PyTorch's own code causes them
        export_onnx(call, path)
    return Exported(unet, call, path)


def randn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator)


def same_shapes(inputs: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return {name: tuple(tensor.shape) for name, tensor in inputs.items()} == dict(shapes)
