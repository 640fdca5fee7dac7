from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor

from deployments.settings import Settings
from engines.animatediff.unet import MotionUNet
from engines.backends.unet_call import UNetCall
from engines.controlnext.unet import SVDUNet
from tests.engines.backends.trt.exports import call_of, export_motion, export_svd, motion_unet, svd_unet

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
def exports(demo_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Future[Path]]]:
    """The graphs of `tests.engines.backends.trt`, exported in a separate process that ends after the last one."""
    folder = tmp_path_factory.mktemp("onnx")
    process = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    futures = {
        "motion": process.submit(export_motion, folder / "motion.onnx"),
        "svd": process.submit(export_svd, demo_settings.demo_weights / "controlnext", folder / "svd.onnx"),
    }
    process.shutdown(wait=False)
    yield futures
    for future in futures.values():
        future.cancel()


@pytest.fixture(scope="package", autouse=True)
def _exports_begin(request: pytest.FixtureRequest) -> None:
    """Starts the exports with the first test of this folder: most of its tests do not need the graphs."""
    asked = [item for item in request.session.items if isinstance(item, pytest.Function) and "trt" in item.path.parts]
    if any({"motion", "svd", "model"} & set(item.fixturenames) for item in asked):
        request.getfixturevalue("exports")


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
