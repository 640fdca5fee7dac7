"""Our attention over frames as a TensorRT plugin: its nodes in a graph, and what TensorRT's Python package gets of them.

TensorRT's C++ library has never run it; `test_gpu.py` would. `test_plugin_gpu.py` runs the machine code without TensorRT.
"""

import base64
import json
import sys
import warnings
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from engines.backends.shapes import Shape, ShapeFamily
from engines.backends.trt import build, plugin
from engines.backends.trt.build import BuildOptions, build_plan
from engines.backends.trt.export import DOMAIN, OUTPUT, TEMPORAL, TEMPORAL_WITH_TABLE, export_onnx
from engines.backends.trt.plugin import frames_of, kernel_of
from engines.backends.trt.profiles import profile_of
from engines.errors import EngineError
from kernels.temporal_attention import by_pytorch
from tests.engines.backends.trt.bindings import empty_libraries, with_bindings
from tests.engines.backends.trt.conftest import randn
from tests.engines.backends.trt.fake_tensorrt import NetworkDefinitionCreationFlag, fake_plan, fake_tensorrt
from tests.engines.backends.trt.motion import HEADS, small_motion_call
from tests.engines.backends.trt.scaled import FAMILIES, scaled_call

OURS = ("temporal_attention",)
WITH_PLUGIN = BuildOptions(plugins=OURS)
FRAMES = 6  # another number than the example's


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "motion.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's warnings about its own deprecations
        export_onnx(small_motion_call(), path, OURS, FRAMES)
    return path


def test_attentions_over_frames_are_nodes_of_ours_and_the_rest_is_native(graph: Path):
    model = onnx.load(graph)
    counts = Counter(node.op_type for node in model.graph.node)
    assert (counts[TEMPORAL_WITH_TABLE], counts[TEMPORAL], counts["Attention"]) == (2, 1, 1)
    for node in model.graph.node:
        if node.domain:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            assert attributes == {
                "frames_and_heads": [FRAMES, HEADS], "plugin_namespace": b"reelray", "plugin_version": b"1", "aot": 1
            }  # fmt: skip
            assert node.domain == DOMAIN
    assert not model.functions


class Node(OpRun):
    """Computes one of our nodes from its inputs and attributes alone."""

    op_domain = DOMAIN

    def _run(self, qkv: Any, *position: Any, frames_and_heads: list[int], **others: Any) -> tuple[Any]:
        table = torch.tensor(position[0]) if position else None
        return (by_pytorch(torch.tensor(qkv), *frames_and_heads, table).numpy(),)


BY_PYTORCH = [type(name, (Node,), {}) for name in (TEMPORAL, TEMPORAL_WITH_TABLE)]


@pytest.mark.parametrize("length", [8, 10])
def test_a_graph_whose_nodes_are_computed_as_they_say_is_the_module(graph: Path, length: int):
    latents = randn(2, FRAMES, length, 32)
    with torch.inference_mode():
        expected = small_motion_call().module(latents)
        (seen,) = ReferenceEvaluator(str(graph), new_ops=BY_PYTORCH).run([OUTPUT], {"latents": latents.numpy()})
    assert expected.std() > 0.01
    torch.testing.assert_close(torch.from_numpy(seen), expected, atol=1e-5, rtol=0)


def test_the_real_parser_looks_our_nodes_up_among_its_plugins(graph: Path):
    """TensorRT-RTX has no plugins, but its error shows that it looked for one."""
    library: ModuleType = pytest.importorskip(
        "tensorrt_rtx", reason="no tensorrt_rtx: not verified that a real parser takes our nodes for plugins"
    )
    with pytest.raises(EngineError, match=rf"operator: {TEMPORAL} .*Plugin not found"):
        build_plan(library, graph, [])


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("triton", reason="no triton: not verified that TensorRT's Python package accepts our plugins")
    libraries = empty_libraries(tmp_path_factory.mktemp("empty"), "our plugins are what TensorRT's Python package requires")
    path = tmp_path_factory.mktemp("told") / "told.json"
    with_bindings(libraries, "plugin_flow.py", "90", str(path))
    return json.loads(path.read_text())


NODES = {  # qkv, frames, heads, whether there is a table, dtype; positions of a block of 64 or 32 rows
    "svd": ((24, 2304, 960), 24, 5, False, "bf16", 2),
    "motion": ((32, 67, 960), 16, 8, True, "fp16", 2),
}


@pytest.mark.parametrize("name", NODES)
def test_tensorrts_python_side_launches_as_triton_would(told: dict[str, Any], name: str):
    (images, positions, width), frames, heads, with_table, dtype, of_block = NODES[name]
    qkv = torch.empty(images, positions, width, device="meta")
    assert sorted(told[name]["launches"]) == ["1", "2"], "one tactic per tile"
    for tactic, launch in told[name]["launches"].items():
        kernel = kernel_of(frames, heads, width, with_table, dtype, 90, int(tactic))
        assert base64.b64decode(launch["ptx"]).decode() == kernel.ptx
        assert launch["entry"] == kernel.entry
        assert launch["whole"] == [["INT32", value] for value in (positions, *qkv.stride()[:2])]
        assert launch["grid_x"] == images // frames * -(-positions // of_block) * heads
        assert (launch["block_x"], launch["shared_mem"]) == (kernel.threads, kernel.shared)
        assert {launch[side] for side in ("grid_y", "grid_z", "block_y", "block_z")} == {1}


@pytest.mark.parametrize("name", NODES)
def test_tensorrts_python_side_learns_shapes_types_and_attributes(told: dict[str, Any], name: str):
    (images, positions, width), _, _, with_table, dtype, _ = NODES[name]
    kind = {"fp16": "HALF", "bf16": "BF16"}[dtype]
    assert told[name]["output"] == [kind, [images, positions, width // 3]]
    assert told[name]["combinations"] == [[kind, "LINEAR"]] * (3 if with_table else 2)
    assert told[name]["field"] == ["frames_and_heads", "INT32"], "the node's attribute"


def test_tensorrts_python_side_does_check_annotations(told: dict[str, Any]):
    """Otherwise the tests above could pass without checking anything."""
    assert "does not have a type annotation" in told["unannotated"]


def test_a_tensor_of_another_type_is_refused(told: dict[str, Any]):
    assert "['BF16', 'HALF'], not in FLOAT" in told["fp32"]


def rtx() -> ModuleType:
    library = fake_tensorrt("1.7.1.116")
    library.__name__ = "tensorrt_rtx"
    return library


@pytest.mark.parametrize(
    ("library", "options", "words"),
    [
        (rtx(), WITH_PLUGIN, "tensorrt_rtx has no plugins"),
        (fake_tensorrt(), BuildOptions(plugins=("attention",)), r"no plugin for \['attention'\], only for"),
    ],
    ids=["TensorRT-RTX", "an operation without"],
)
def test_what_has_no_plugin_is_refused_before_anything_is_registered(
    library: ModuleType, options: BuildOptions, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(build, "register", lambda: pytest.fail("registered"))
    with pytest.raises(EngineError, match=words):
        build_plan(library, tmp_path / "no.onnx", [], options)
    with pytest.raises(EngineError, match=words):
        frames_of(library, options.plugins, [ShapeFamily.fixed(16, 8, 8)], torch.float16)


def test_the_real_tensorrt_rtx_is_refused(graph: Path, monkeypatch: pytest.MonkeyPatch):
    library: ModuleType = pytest.importorskip("tensorrt_rtx", reason="no tensorrt_rtx: not verified that it gets no plugins")
    monkeypatch.setattr(build, "register", lambda: pytest.fail("registered"))
    with pytest.raises(EngineError, match="tensorrt_rtx has no plugins"):
        build_plan(library, graph, [], WITH_PLUGIN)


def test_without_triton_there_is_no_plugin(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plugin, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"triton is not installed.*reelray\[gpu\]"):
        frames_of(fake_tensorrt(), OURS, [ShapeFamily.fixed(16, 8, 8)], torch.float16)


def test_plugins_are_registered_before_the_graph_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "graph.onnx"
    call = scaled_call()
    monkeypatch.setattr(build, "register", lambda: path.write_text(json.dumps(fake_plan(call, ()))))
    profiles = [profile_of(call, family) for family in FAMILIES]
    flags = NetworkDefinitionCreationFlag
    both = 1 << flags.STRONGLY_TYPED | 1 << flags.PREFER_AOT_PYTHON_PLUGINS
    assert json.loads(build_plan(fake_tensorrt(), path, profiles, WITH_PLUGIN).plan)["flags"] == both
    assert json.loads(build_plan(fake_tensorrt(), path, profiles).plan)["flags"] == 1 << flags.STRONGLY_TYPED


def test_a_tensorrt_without_such_plugins_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt())
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", None)
    with pytest.raises(EngineError, match=r"tensorrt\.plugin cannot be imported"):
        plugin.register()


@pytest.mark.parametrize(
    ("families", "dtype", "words"),
    [
        ([ShapeFamily.fixed(16, 8, 8), ShapeFamily.fixed(24, 8, 8)], torch.float16, r"not for \[16, 24\]"),
        ([ShapeFamily(Shape(8, 8, 8), Shape(16, 8, 8), Shape(32, 8, 8))], torch.float16, r"not for \[8, 32\]"),
        ([], torch.float16, r"not for \[\]"),
        ([ShapeFamily.fixed(33, 8, 8)], torch.float16, "for 32 at most, not for 33"),
        ([ShapeFamily.fixed(16, 8, 8)], torch.float32, r"not in torch\.float32"),
    ],
    ids=["two numbers", "a range", "none", "too many", "fp32"],
)
def test_a_plan_with_plugins_is_for_one_number_of_frames_in_half_precision(
    families: list[ShapeFamily], dtype: torch.dtype, words: str
):
    with pytest.raises(EngineError, match=words):
        frames_of(fake_tensorrt(), OURS, families, dtype)


def test_height_and_width_may_change():
    families = [ShapeFamily(Shape(16, 64, 64), Shape(16, 64, 96), Shape(16, 64, 96)), ShapeFamily.fixed(16, 64, 64)]
    assert frames_of(fake_tensorrt(), OURS, families, torch.bfloat16) == 16
    assert frames_of(fake_tensorrt(), (), FAMILIES, torch.float32) == 0, "without plugins, any number of frames"
