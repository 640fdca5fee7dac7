from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor

from deployments.settings import Settings
from engines.animatediff.unet import MotionUNet
from engines.backends.unet_call import UNetCall
from engines.controlnext.unet import SVDUNet
from tests.engines.backends.trt.exports import call_of, motion_unet, svd_unet

Exports = Mapping[str, Future[Path]]


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
def motion(exports: Exports) -> Exported:
    return exported(motion_unet(), exports["motion"])


@pytest.fixture(scope="session")
def svd(exports: Exports, demo_settings: Settings) -> Exported:
    return exported(svd_unet(demo_settings.demo_weights / "controlnext"), exports["svd"])


def exported(unet: MotionUNet | SVDUNet, export: Future[Path]) -> Exported:
    return Exported(unet, call_of(unet), export.result())


def randn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator)


def same_shapes(inputs: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return {name: tuple(tensor.shape) for name, tensor in inputs.items()} == dict(shapes)
