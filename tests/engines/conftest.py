from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from deployments.settings import Settings
from engines.animatediff.config import AnimateDiffConfig, AnimateDiffWeights
from engines.animatediff.demo_weights import write_demo_weights
from engines.pipeline import Pipeline
from tests.engines.backends.trt.exports import export_motion, export_svd

torch.set_num_threads(1)
"""One thread: on a busy machine two threads of a tiny model mostly wait for each other."""


@pytest.fixture(scope="session")
def demo_weights(tmp_path_factory: pytest.TempPathFactory) -> AnimateDiffWeights:
    return write_demo_weights(tmp_path_factory.mktemp("weights") / "demo")


@pytest.fixture(scope="session")
def pipeline(demo_weights: AnimateDiffWeights) -> Pipeline:
    return Pipeline("animatediff-sparsectrl-lcm", AnimateDiffConfig(weights=demo_weights, threads=1))


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
    """Starts the exports before the engines' other tests, which use one core. Only the last tests wait for the graphs."""
    asked = [item for item in request.session.items if isinstance(item, pytest.Function) and "trt" in item.path.parts]
    if any({"motion", "svd", "model"} & set(item.fixturenames) for item in asked):
        request.getfixturevalue("exports")
