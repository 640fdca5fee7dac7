from pathlib import Path

import pytest

from engines.animatediff.config import AnimateDiffConfig, AnimateDiffWeights
from engines.animatediff.demo_weights import write_demo_weights
from engines.pipeline import Pipeline


@pytest.fixture(scope="session")
def demo_weights(tmp_path_factory: pytest.TempPathFactory) -> AnimateDiffWeights:
    return write_demo_weights(tmp_path_factory.mktemp("weights") / "demo")


@pytest.fixture(scope="session")
def pipeline(demo_weights: AnimateDiffWeights) -> Pipeline:
    return Pipeline("animatediff-sparsectrl-lcm", AnimateDiffConfig(weights=demo_weights))
