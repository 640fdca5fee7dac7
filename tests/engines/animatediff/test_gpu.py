"""Needs a GPU: the demo checkpoints through every stage on CUDA, compared with the CPU."""

import numpy as np
import pytest
import torch

from engines.animatediff.config import AnimateDiffConfig, AnimateDiffWeights
from engines.animatediff.spec import AnimateDiffSpec
from engines.checkpoints.source import DType
from engines.pipeline import Pipeline
from tests.engines.animatediff.media import keyframes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no GPU: not verified that CUDA in fp32 and fp16 agrees with the CPU, repeatably"
    ),
]

SPEC = AnimateDiffSpec(7, 4, 2.0, "a red ball", "blur", "rgb", keyframes(0, 8, 15))


@pytest.fixture(scope="module")
def on_cuda(demo_weights: AnimateDiffWeights) -> Pipeline:
    return Pipeline("animatediff-sparsectrl-lcm", AnimateDiffConfig(weights=demo_weights, threads=1, device="cuda"))


def test_cuda_in_fp32_gives_the_latents_of_the_cpu(pipeline: Pipeline, on_cuda: Pipeline):
    assert (on_cuda.latents(SPEC).values - pipeline.latents(SPEC).values).abs().max() <= 1e-3


def test_cuda_gives_the_same_bits_twice(on_cuda: Pipeline):
    assert torch.equal(on_cuda.latents(SPEC).values, on_cuda.latents(SPEC).values)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_on_cuda_is_near_and_finite(pipeline: Pipeline, demo_weights: AnimateDiffWeights, dtype: DType):
    config = AnimateDiffConfig(weights=demo_weights, threads=1, device="cuda", dtype=dtype)
    half = Pipeline("animatediff-sparsectrl-lcm", config)
    expected = np.concatenate(list(pipeline.decode.frames(pipeline.latents(SPEC)))).astype(float)
    seen = np.concatenate(list(half.decode.frames(half.latents(SPEC)))).astype(float)
    assert np.abs(seen - expected).mean() <= 8  # levels of 255
