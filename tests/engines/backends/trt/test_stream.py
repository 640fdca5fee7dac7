"""Needs a GPU: the engine's stream and CUDA graphs. TensorRT is not used; PyTorch's kernels are recorded."""

import json

import pytest
import torch

from engines.backends.trt.gpu import gpu_of
from engines.backends.trt.runner import TensorRTEngine
from engines.backends.trt.stream import CudaStream
from tests.engines.backends.trt.fake_tensorrt import fake_plan, fake_tensorrt
from tests.engines.backends.trt.scaled import FAMILIES, FIXED, WIDE, inputs_of, scaled_call

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no GPU: not verified that an engine's stream keeps its caller's order and replays"
    ),
]

A_WHILE = 200_000_000
"""Clock cycles of a slow kernel, about 0.1 s: work that does not wait for it gives a wrong result."""


@pytest.fixture
def stream() -> CudaStream:
    return CudaStream(torch.device("cuda", torch.cuda.current_device()))


def test_a_capture_is_replayed_on_the_current_values_in_memory(stream: CudaStream):
    seen, made = torch.zeros(1024, device="cuda"), torch.zeros(1024, device="cuda")
    calls = []

    def launch() -> None:
        calls.append(1)
        torch.add(seen, 1, out=made)

    with stream.entered():
        repeat = stream.captured(launch)
    assert len(calls) == 2
    seen.fill_(5)
    with stream.entered():
        repeat()
    assert made.eq(6).all()


def test_the_callers_work_comes_before_and_after(stream: CudaStream):
    value = torch.zeros(1024, device="cuda")
    torch.cuda._sleep(A_WHILE)
    value.fill_(1)
    with stream.entered():
        torch.cuda._sleep(A_WHILE)
        value.mul_(3)
    value.add_(1)
    assert value.eq(4).all()


def test_the_order_is_kept_where_the_caller_has_a_stream_of_its_own(stream: CudaStream):
    with torch.cuda.stream(torch.cuda.Stream()):
        test_the_callers_work_comes_before_and_after(stream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_an_engine_of_the_fake_library_is_right_on_cuda_with_real_graphs(stream: CudaStream, dtype: torch.dtype):
    call = scaled_call(2.0, dtype)
    plan = json.dumps(fake_plan(call, FAMILIES)).encode()
    engine = TensorRTEngine(plan, fake_tensorrt(), call, FAMILIES, stream)
    module = call.module.to("cuda")
    for seed, shape in enumerate([FIXED.best, WIDE.largest, FIXED.best, WIDE.smallest, WIDE.largest]):
        inputs = {name: tensor.to("cuda") for name, tensor in inputs_of(call, shape, seed).items()}
        torch.cuda._sleep(A_WHILE)
        inputs = {name: tensor * 2 for name, tensor in inputs.items()}
        torch.testing.assert_close(engine(inputs), module(*inputs.values()))


def test_the_gpu_and_its_driver_are_told():
    gpu = gpu_of(torch.device("cuda", torch.cuda.current_device()))
    assert gpu.name == torch.cuda.get_device_name()
    assert gpu.capability == torch.cuda.get_device_capability()
    assert gpu.multiprocessors > 0
    assert gpu.driver_major >= 400
