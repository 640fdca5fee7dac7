"""Needs a GPU: the demo checkpoints through every stage on CUDA, compared with the CPU."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from engines.checkpoints.source import DType
from engines.controlnext.config import ControlNeXtConfig, ControlNeXtWeights
from engines.controlnext.demo_pose import puppet_image, write_puppet_clip
from engines.controlnext.spec import ControlNeXtSpec
from engines.pipeline import Pipeline

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="no GPU: not verified that ControlNeXt on CUDA in fp32, fp16 and bf16 agrees with the CPU, repeatably",
    ),
]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ControlNeXtSpec:
    folder = tmp_path_factory.mktemp("media")
    (folder / "image.png").write_bytes(puppet_image(192, 128))
    write_puppet_clip(folder / "clip.mp4", 12, 192, 128, 14)
    return ControlNeXtSpec(
        7, 4, 3.0, folder / "image.png", folder / "clip.mp4", 192, 128, batch_frames=6, overlap=2, sample_stride=1
    )


@pytest.fixture(scope="module")
def on_cpu(controlnext_weights: ControlNeXtWeights) -> Pipeline:
    return Pipeline("controlnext", ControlNeXtConfig(weights=controlnext_weights))


def on_cuda(weights: ControlNeXtWeights, dtype: DType) -> Pipeline:
    return Pipeline("controlnext", ControlNeXtConfig(weights=weights, device="cuda", dtype=dtype))


def test_cuda_in_fp32_gives_the_latents_of_the_cpu_and_the_same_bits_twice(
    on_cpu: Pipeline, controlnext_weights: ControlNeXtWeights, spec: ControlNeXtSpec
):
    pipeline = on_cuda(controlnext_weights, "float32")
    latents = pipeline.latents(spec).values
    assert (latents - on_cpu.latents(spec).values).abs().max() <= 1e-3
    assert torch.equal(latents, pipeline.latents(replace(spec)).values)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_on_cuda_is_near_and_finite(
    on_cpu: Pipeline, controlnext_weights: ControlNeXtWeights, spec: ControlNeXtSpec, dtype: DType
):
    half = on_cuda(controlnext_weights, dtype)
    expected = np.concatenate(list(on_cpu.decode.frames(on_cpu.latents(spec)))).astype(float)
    seen = np.concatenate(list(half.decode.frames(half.latents(spec)))).astype(float)
    assert np.abs(seen - expected).mean() <= 8  # levels of 255


def test_the_file_has_what_was_asked_for(controlnext_weights: ControlNeXtWeights, spec: ControlNeXtSpec):
    clip = on_cuda(controlnext_weights, "float16").render(spec)
    assert (clip.num_frames, clip.height, clip.width, clip.fps) == (13, 192, 128, 7)
