"""Needs a GPU: the tuned and recorded UNets compared with the eager ones on the same GPU, in fp32 and half precision."""

import pytest
import torch

from engines.backends.inductor import InductorEngine
from engines.backends.shapes import Shape
from tests.engines.backends.calls import motion, random_inputs, svd, toy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="no GPU: not verified that UNets compiled for a GPU and recorded as CUDA graphs compute what the eager ones do",
    ),
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),  # the compiler's warnings about itself differ between GPUs and versions
]

SHAPES = Shape(16, 8, 8), Shape(8, 16, 8)


@pytest.fixture(autouse=True)
def _fp32_is_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the service: otherwise the eager convolutions round to 10 bits (TF32) and the compiled ones do not."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("make", [motion, svd])
def test_recorded_unets_compute_what_the_eager_ones_do(make, dtype: torch.dtype):
    call = make("cuda", dtype)
    engine = InductorEngine(call, autotune=dtype == torch.float16)  # only in the dtype that is served
    for shape in SHAPES:
        engine.prepare(shape)
    with torch.inference_mode():
        for shape in (*SHAPES, *SHAPES):
            inputs = {name: tensor.to("cuda", dtype) for name, tensor in random_inputs(call, shape).items()}
            expected, output = call.module(*inputs.values()), engine(inputs)
            assert (output - expected).abs().max() <= (1e-3 if dtype == torch.float32 else 2e-2) * expected.abs().max()


def test_engines_that_share_memory_may_take_turns():
    pool = torch.cuda.graph_pool_handle()
    engines = [InductorEngine(toy(device="cuda"), autotune=False, pool=pool) for _ in range(2)]
    for engine in engines:
        engine.prepare(SHAPES[0])
    given = [{name: t.cuda() for name, t in random_inputs(engines[0].call, SHAPES[0], seed).items()} for seed in range(2)]
    outputs = [engine(inputs) for engine, inputs in zip(engines, given, strict=True)]
    for output, inputs in zip(outputs, given, strict=True):
        assert torch.equal(output, engines[0].call.module(*inputs.values()))
