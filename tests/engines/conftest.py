import pytest
import torch

from engines.animatediff.config import AnimateDiffConfig, AnimateDiffWeights
from engines.animatediff.demo_weights import DemoSize, write_demo_weights
from engines.pipeline import Pipeline


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """On a busy machine two threads of a tiny model mostly wait for each other. Stages that other tests built took more."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo_weights(tmp_path_factory: pytest.TempPathFactory) -> AnimateDiffWeights:
    return write_demo_weights(tmp_path_factory.mktemp("weights") / "demo")


@pytest.fixture(scope="session")
def small_weights(tmp_path_factory: pytest.TempPathFactory) -> AnimateDiffWeights:
    """For 32x32 pixels, a quarter of the demo's, where their number shows nothing."""
    return write_demo_weights(tmp_path_factory.mktemp("weights") / "small", DemoSize(latent=4))


@pytest.fixture(scope="session")
def pipeline(demo_weights: AnimateDiffWeights) -> Pipeline:
    return Pipeline("animatediff-sparsectrl-lcm", AnimateDiffConfig(weights=demo_weights, threads=1))
