"""Needs a GPU: UNets recorded as CUDA graphs compute what the recorded modules compute."""

import pytest
import torch

from engines.backends.cuda_graph import GraphEngine
from engines.backends.shapes import Shape
from tests.engines.backends.calls import motion, random_inputs, svd

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="no GPU: not verified that recorded UNets compute what the modules do",
    ),
]

SHAPES = Shape(16, 8, 8), Shape(8, 16, 8)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("make", [motion, svd])
def test_a_recorded_unet_computes_what_the_modules_do(make, dtype: torch.dtype):
    call = make("cuda", dtype)
    engine = GraphEngine(call)
    for shape in SHAPES:
        engine.prepare(shape)
    for shape in (*SHAPES, *SHAPES):
        inputs = {name: tensor.to("cuda", dtype) for name, tensor in random_inputs(call, shape).items()}
        laid_out = {
            name: tensor.to(memory_format=torch.channels_last) if tensor.ndim == 4 and name != "latents" else tensor
            for name, tensor in inputs.items()
        }
        expected = call.module(*laid_out.values())
        assert torch.isfinite(expected).all()
        # the bits may differ: on the recording's stream the libraries may choose another algorithm (seen in fp32)
        assert (engine(inputs) - expected).abs().max() <= (1e-3 if dtype == torch.float32 else 2e-2) * expected.abs().max()
