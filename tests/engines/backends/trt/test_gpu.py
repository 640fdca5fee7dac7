"""Needs TensorRT and a GPU: compares the tiny UNets' engines with PyTorch, with built-in and with exchanged weights."""

from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from engines.animatediff.call import motion_call
from engines.animatediff.checkpoint import load_unet as load_motion_unet
from engines.animatediff.config import AnimateDiffConfig, AnimateDiffWeights
from engines.backends.shapes import Shape, ShapeFamily
from engines.backends.trt.build import BuildOptions
from engines.backends.trt.cache import PlanCache
from engines.backends.trt.export import export_onnx
from engines.backends.trt.gpu import gpu_of
from engines.backends.trt.library import load_library
from engines.backends.trt.plans import load_engine, plan_key
from engines.backends.trt.runner import TensorRTEngine
from engines.backends.trt.stream import CudaStream
from engines.backends.unet_call import UNetCall
from engines.controlnext.call import svd_call
from engines.controlnext.checkpoint import load_unet as load_svd_unet
from engines.controlnext.config import ControlNeXtConfig
from engines.controlnext.demo_weights import write_demo_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore"),  # warnings of TensorRT and the exporter
    pytest.mark.skipif(
        not torch.cuda.is_available() or find_spec("tensorrt") is None,
        reason="no GPU or no TensorRT: not verified that plans (also with our plugin) build, run, refit and equal PyTorch",
    ),
]

WIDE = ShapeFamily(Shape(2, 8, 8), Shape(8, 8, 8), Shape(16, 16, 16))
FAMILIES = (ShapeFamily.fixed(8, 8, 8), WIDE)
SHAPES = [Shape(8, 8, 8), Shape(5, 16, 8), Shape(8, 8, 8), Shape(16, 16, 16)]
PLAIN, REFIT = BuildOptions(), BuildOptions(refit=True)
ERRORS = {"float32": 5e-3, "float16": 2e-2}
"""Relative error of the whole result, for TF32 and for half precision. A lost bias or a wrong layer gives far more."""


@pytest.fixture(scope="module")
def library() -> ModuleType:
    return load_library("tensorrt")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> PlanCache:
    return PlanCache(tmp_path_factory.mktemp("plans") / "plans")


@pytest.fixture(scope="module", params=["motion-float32", "motion-float16", "svd-float16"])
def call(request: pytest.FixtureRequest, demo_weights: AnimateDiffWeights, tmp_path_factory: pytest.TempPathFactory) -> UNetCall:
    model, dtype = request.param.split("-")
    if model == "motion":
        return motion_call(load_motion_unet(AnimateDiffConfig(weights=demo_weights, device="cuda", dtype=dtype)), halves=2)
    weights = write_demo_weights(tmp_path_factory.mktemp("weights") / "controlnext")
    return svd_call(load_svd_unet(ControlNeXtConfig(weights=weights, device="cuda", dtype=dtype)))


def engine(call: UNetCall, library: ModuleType, cache: PlanCache, options: BuildOptions = PLAIN) -> TensorRTEngine:
    device = call.example["latents"].device
    return load_engine(call, FAMILIES, library, cache, CudaStream(device), gpu_of(device), options)


def inputs_of(call: UNetCall, shape: Shape) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(shape.frames)
    like = call.example["latents"]
    return {name: torch.randn(size, generator=generator).to(like) for name, size in call.shapes(shape).items()}


def error(seen: Tensor, expected: Tensor) -> float:
    assert expected.float().std() > 0.01, "nearly constant values: the comparison would show nothing"
    return float((seen.float() - expected.float()).norm() / expected.float().norm())


def assert_agrees(engine: TensorRTEngine, call: UNetCall) -> None:
    largest = ERRORS[str(call.example["latents"].dtype).removeprefix("torch.")]
    with torch.inference_mode():
        for shape in SHAPES:
            inputs = inputs_of(call, shape)
            assert error(engine(inputs), call.module(*inputs.values())) <= largest


def test_a_plain_engine_agrees_with_pytorch_in_every_shape(call: UNetCall, library: ModuleType, cache: PlanCache):
    assert_agrees(engine(call, library, cache), call)


def test_an_engine_that_can_be_refitted_agrees_too(call: UNetCall, library: ModuleType, cache: PlanCache):
    assert_agrees(engine(call, library, cache, REFIT), call)


def test_exchanged_weights_are_the_ones_that_run(call: UNetCall, library: ModuleType, cache: PlanCache, tmp_path: Path):
    ready = engine(call, library, cache, REFIT)
    assert_agrees(ready, call)
    kept = {name: tensor.clone() for name, tensor in call.module.state_dict().items()}
    try:
        for tensor in call.module.state_dict().values():
            tensor.mul_(0.9)
        with pytest.raises(AssertionError):
            assert_agrees(ready, call)
        export_onnx(call, tmp_path / "other.onnx")
        ready.refit(tmp_path / "other.onnx")
        assert_agrees(ready, call)
        assert_agrees(engine(call, library, cache, REFIT), call)
    finally:
        call.module.load_state_dict(kept)


def test_an_engine_gives_the_same_bits_twice_and_with_graphs_and_without(call: UNetCall, library: ModuleType, cache: PlanCache):
    ready = engine(call, library, cache)
    device = call.example["latents"].device
    plan = cache.load(plan_key(call, FAMILIES, library, gpu_of(device), PLAIN))
    assert plan is not None
    plain = TensorRTEngine(plan, library, call, FAMILIES, CudaStream(device), graphs=False)
    for shape in SHAPES:
        inputs = inputs_of(call, shape)
        first = ready(inputs)
        assert torch.equal(ready(inputs), first)
        assert torch.equal(plain(inputs), first)


def test_an_engine_is_found_again_without_an_export(
    call: UNetCall, library: ModuleType, cache: PlanCache, monkeypatch: pytest.MonkeyPatch
):
    engine(call, library, cache)
    monkeypatch.setattr("engines.backends.trt.plans.export_onnx", None)
    assert engine(call, library, cache).holds(SHAPES[0])
    key = plan_key(call, FAMILIES, library, gpu_of(call.example["latents"].device), PLAIN)
    assert cache.timings(key.timings)


def test_an_engine_with_our_plugin_agrees_with_pytorch(call: UNetCall, library: ModuleType, cache: PlanCache):
    """Also with weights that are exchanged later, and at heights and widths that the kernel was not compiled for."""
    device = call.example["latents"].device
    families = (ShapeFamily(Shape(8, 8, 8), Shape(8, 8, 8), Shape(8, 16, 16)),)
    dtype = call.example["latents"].dtype
    if dtype == torch.float32:
        pytest.skip("plugins compute in half precision")
    for refit in (False, True):
        options = BuildOptions(refit=refit, plugins=("temporal_attention",))
        ready = load_engine(call, families, library, cache, CudaStream(device), gpu_of(device), options)
        with torch.inference_mode():
            for shape in (Shape(8, 8, 8), Shape(8, 16, 8), Shape(8, 16, 16)):
                inputs = inputs_of(call, shape)
                assert error(ready(inputs), call.module(*inputs.values())) <= ERRORS["float16"]
    assert any(
        "Reelray" in layer.name + layer.kind + layer.tactic or "temporal" in layer.name for layer in ready.inspect().layers
    )


def test_an_engine_tells_its_layers(call: UNetCall, library: ModuleType, cache: PlanCache):
    report = engine(call, library, cache).inspect()
    assert len(report.layers) > 10
    assert any(layer.kind and layer.tactic for layer in report.layers)
    assert {port.name for port in report.ports} == {*call.dims, "output"}
    assert all(size > 0 for size in report.memory_bytes)
