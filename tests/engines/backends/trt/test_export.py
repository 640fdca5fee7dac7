"""Compares the exported graphs in ONNX Runtime with our UNets in torch, also at shapes other than the exported example's."""

from collections.abc import Mapping

import onnx
import onnxruntime
import pytest
import torch
from diffusers import UNetMotionModel, UNetSpatioTemporalConditionModel
from torch import Tensor

from engines.animatediff import published as animatediff_sizes
from engines.animatediff.call import motion_call, motion_inputs
from engines.animatediff.nets.unet import MotionUNet, Residuals
from engines.backends.shapes import Shape
from engines.backends.trt.export import OPSET, OUTPUT
from engines.checkpoints.weights import build
from engines.controlnext import published as controlnext_sizes
from engines.controlnext.call import svd_call, svd_inputs
from engines.controlnext.nets.unet import Control, SVDUNet
from tests.engines.backends.trt.conftest import Exported, randn, same_shapes
from tests.load.bench_flops import with_known_blend

pytestmark = pytest.mark.timeout(600)  # the first test that asks for a graph also exports it

TOLERANCE = 1e-5
SHAPES = [(4, 8, 12), (7, 8, 8), (16, 16, 8)]  # the first is that of the exported example
MODELS = ["motion", "svd"]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.inference_mode():
        yield


def run(graph: Exported, inputs: Mapping[str, Tensor]) -> Tensor:
    session = onnxruntime.InferenceSession(graph.path, providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == list(inputs)
    (output,) = session.run([OUTPUT], {name: tensor.numpy() for name, tensor in inputs.items()})
    return torch.from_numpy(output)


def assert_same(graph: Exported, inputs: Mapping[str, Tensor], expected: Tensor, shape: tuple[int, int, int]):
    assert same_shapes(inputs, graph.call.shapes(Shape(*shape)))
    assert expected.std() > 0.01, "nearly constant values: the comparison would show nothing"
    assert (run(graph, inputs) - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("shape", SHAPES)
def test_the_motion_unet_under_sparse_control_is_the_same_in_onnx_runtime(motion: Exported, shape: tuple[int, int, int]):
    unet, shapes = motion.unet, motion.call.shapes(Shape(*shape))
    assert isinstance(unet, MotionUNet)
    skips = tuple(randn(*size) for name, size in shapes.items() if name.startswith("skip"))
    residuals = Residuals(skips, randn(*shapes["mid"]))
    args = (randn(*shapes["latents"]), unet.time_embeddings((499,)), unet.text_context(randn(2, 77, 32)), residuals)
    assert_same(motion, motion_inputs(*args), unet(*args), shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_svd_unet_under_control_is_the_same_in_onnx_runtime(svd: Exported, shape: tuple[int, int, int]):
    unet, shapes = svd.unet, svd.call.shapes(Shape(*shape))
    assert isinstance(unet, SVDUNet)
    half = unet.guidance_half(randn(4, *shape[1:]), randn(1, 32))
    (time,) = unet.time_biases([0.37], (6.0, 127.0, 0.02))
    args = (randn(*shapes["latents"]), half, time, Control(randn(*shapes["control"]), 0.8))
    assert_same(svd, svd_inputs(*args), unet(*args), shape)


@pytest.mark.parametrize(("model", "count"), [("motion", 8), ("svd", 2)])
def test_every_attention_is_one_operator_and_every_norm_too(model: str, count: int, request: pytest.FixtureRequest):
    graph: Exported = request.getfixturevalue(model)
    operators = graph.operators
    attentions = [module for module in graph.unet.modules() if type(module).__name__.endswith("Attention")]
    assert operators.count("Attention") == len(attentions) == count
    assert not {"Softmax", "InstanceNormalization"} & set(operators)
    assert [(o.domain, o.version) for o in onnx.load(graph.path).opset_import if not o.domain] == [("", OPSET)]


@pytest.mark.parametrize("model", MODELS)
def test_inputs_that_must_be_equally_large_say_so(model: str, request: pytest.FixtureRequest):
    graph: Exported = request.getfixturevalue(model)
    named = {}
    for value in onnx.load(graph.path).graph.input:
        named[value.name] = tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
    assert named == dict(graph.call.dims)


def test_the_call_of_a_lone_uncontrolled_half_has_no_inputs_of_the_control(motion: Exported, svd: Exported):
    assert isinstance(motion.unet, MotionUNet)
    assert isinstance(svd.unet, SVDUNet)
    lone = motion_call(motion.unet, halves=1, controlled=False)
    assert not any(name.startswith(("skip", "mid")) for name in lone.dims)
    assert lone.shapes(Shape(16, 8, 8))["latents"] == (1, 4, 16, 8, 8)
    assert not any(name.startswith("control") for name in svd_call(svd.unet, controlled=False).dims)


def test_a_size_that_the_unet_cannot_halve_is_refused(motion: Exported):
    assert motion.call.multiple == 2
    with pytest.raises(ValueError, match="height 9"):
        motion.call.shapes(Shape(4, 9, 8))


def test_inputs_at_full_size_are_as_published():
    """video-models.md, 2A.6 and 1B."""
    motion = motion_call(MotionUNet(build(lambda: UNetMotionModel(**animatediff_sizes.UNET))))
    assert motion.multiple == 8
    residuals = [shape for name, shape in motion.shapes(Shape(16, 64, 64)).items() if name.startswith(("skip", "mid"))]
    sizes = [(320, 64)] * 3 + [(320, 32)] + [(640, 32)] * 2 + [(640, 16)] + [(1280, 16)] * 2 + [(1280, 8)] * 4
    assert residuals == [(16, channels, side, side) for channels, side in sizes]
    stock = build(lambda: UNetSpatioTemporalConditionModel(**controlnext_sizes.UNET))
    with_known_blend(stock)
    svd = svd_call(SVDUNet(stock))
    assert svd.multiple == 8
    assert svd.shapes(Shape(24, 128, 72))["control"] == (24, 320, 64, 36)
