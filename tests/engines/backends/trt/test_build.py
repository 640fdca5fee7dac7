"""Builds real plans of both tiny UNets with TensorRT-RTX, which needs no GPU for it. Plans are not run here: that needs a GPU."""

import dataclasses
from pathlib import Path
from types import ModuleType

import onnx
import pytest
from onnx import TensorProto, helper

from engines.backends.shapes import Shape, ShapeFamily
from engines.backends.trt.build import BuildOptions, build_plan
from engines.backends.trt.profiles import Range, profile_of
from engines.errors import EngineError
from tests.engines.backends.trt.conftest import Exported

SMALL = ShapeFamily(Shape(2, 8, 8), Shape(8, 8, 8), Shape(16, 16, 16))
pytestmark = pytest.mark.timeout(600)  # the first test that asks for a graph also exports it

FOR_ANY_MACHINE = BuildOptions(compute_capability="SM89")


@pytest.fixture(scope="module")
def library() -> ModuleType:
    return pytest.importorskip("tensorrt_rtx", reason="no tensorrt_rtx (extra rtx): not verified that it builds our graphs")


@pytest.mark.parametrize(("model", "family"), [("motion", ShapeFamily.fixed(8, 8, 8)), ("svd", SMALL)], ids=["static", "dynamic"])
def test_a_plan_is_built(library: ModuleType, model: str, family: ShapeFamily, request: pytest.FixtureRequest):
    graph: Exported = request.getfixturevalue(model)
    built = build_plan(library, graph.path, [profile_of(graph.call, family)], FOR_ANY_MACHINE)
    weights = sum(p.numel() * p.element_size() for p in graph.unet.parameters())
    assert len(built.plan) > weights // 2, "a plan holds the weights"
    assert built.timings == b"", "TensorRT-RTX measures nothing while it builds"


def changed(profile: dict[str, Range], name: str, **shapes: tuple[int, ...]) -> dict[str, Range]:
    return profile | {name: dataclasses.replace(profile[name], **shapes)}


def test_a_profile_that_does_not_fit_the_graph_is_refused(library: ModuleType, svd: Exported):
    profile = dict(profile_of(svd.call, SMALL))
    other_channels = changed(profile, "latents", best=(8, 5, 8, 8))
    with pytest.raises(EngineError, match="latents is"):
        build_plan(library, svd.path, [other_channels], FOR_ANY_MACHINE)
    without_control = {name: shapes for name, shapes in profile.items() if name != "control"}
    with pytest.raises(EngineError, match="changing inputs"):
        build_plan(library, svd.path, [without_control], FOR_ANY_MACHINE)
    out_of_order = changed(profile, "latents", smallest=(32, 4, 8, 8))
    with pytest.raises(EngineError, match="refused"):
        build_plan(library, svd.path, [out_of_order], FOR_ANY_MACHINE)


def test_inputs_whose_frames_differ_are_refused(library: ModuleType, svd: Exported):
    profile = dict(profile_of(svd.call, ShapeFamily.fixed(8, 8, 8)))
    sizes = (7, *profile["control"].best[1:])
    with pytest.raises(EngineError):
        build_plan(library, svd.path, [profile | {"control": Range(sizes, sizes, sizes)}], FOR_ANY_MACHINE)


def test_what_is_no_graph_is_refused(library: ModuleType, tmp_path: Path):
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineError, match=r"broken\.onnx cannot be read"):
        build_plan(library, tmp_path / "broken.onnx", [])


def test_an_operator_that_tensorrt_does_not_know_is_named(library: ModuleType, tmp_path: Path):
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    node = helper.make_node("NoSuchThing", ["x"], ["y"], domain="reelray")
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("reelray", 1)]
    onnx.save(helper.make_model(helper.make_graph([node], "g", [value], [made]), opset_imports=opsets), tmp_path / "g.onnx")
    with pytest.raises(EngineError, match="NoSuchThing"):
        build_plan(library, tmp_path / "g.onnx", [])


def test_a_gpu_that_the_library_does_not_know_is_refused(library: ModuleType, svd: Exported):
    with pytest.raises(EngineError, match="SM90"):
        build_plan(library, svd.path, [profile_of(svd.call, SMALL)], BuildOptions(compute_capability="SM90"))
