from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from engines.controlnext.config import DETECTOR_FILE, POSE_FILE
from engines.controlnext.demo_pose import write_demo_pose
from engines.controlnext.pose.dwpose import DWPose
from engines.controlnext.pose.session import OnnxNet
from engines.errors import WeightsError


def write_identity(path: Path, shape: list[int | str], kind: int = TensorProto.FLOAT, outputs: int = 1) -> None:
    names = [f"y{i}" for i in range(outputs)]
    nodes = [helper.make_node("Identity", ["x"], [name]) for name in names]
    value = [helper.make_tensor_value_info(name, kind, shape) for name in ("x", *names)]
    graph = helper.make_graph(nodes, "identity", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())


def test_an_absent_file_is_named(tmp_path: Path):
    with pytest.raises(WeightsError, match=f"{DETECTOR_FILE} does not exist"):
        DWPose(tmp_path)


@pytest.mark.parametrize("content", [b"", b"<html>moved</html>", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_file_that_is_no_model_is_named(tmp_path: Path, content: bytes):
    write_demo_pose(tmp_path)
    (tmp_path / POSE_FILE).write_bytes(content)
    with pytest.raises(WeightsError, match=f"{POSE_FILE} cannot be loaded"):
        DWPose(tmp_path)


def test_exchanged_files_are_told_from_their_shapes(tmp_path: Path):
    write_demo_pose(tmp_path)
    (tmp_path / DETECTOR_FILE).rename(tmp_path / "x")
    (tmp_path / POSE_FILE).rename(tmp_path / DETECTOR_FILE)
    (tmp_path / "x").rename(tmp_path / POSE_FILE)
    with pytest.raises(WeightsError, match=r"its inputs are .*384.* instead of float \(1, 3, 640, 640\)"):
        DWPose(tmp_path)


@pytest.mark.parametrize(
    ("shape", "kind", "outputs", "said"),
    [
        ([1, 3], TensorProto.DOUBLE, 1, "double"),
        ([1, 3, 1], TensorProto.FLOAT, 1, "inputs"),
        ([1, 4], TensorProto.FLOAT, 1, "inputs"),
        ([1, 3], TensorProto.FLOAT, 2, "outputs"),
    ],
)
def test_another_signature_is_refused(tmp_path: Path, shape: list[int | str], kind: int, outputs: int, said: str):
    write_identity(tmp_path / "net.onnx", shape, kind, outputs)
    with pytest.raises(WeightsError, match=said):
        OnnxNet(tmp_path / "net.onnx", (1, 3), [(1, 3)])


def test_an_open_dimension_fits_any_number_but_the_result_is_checked(tmp_path: Path):
    write_identity(tmp_path / "net.onnx", ["batch", "any"])
    values = np.ones((1, 3), np.float32)
    np.testing.assert_array_equal(OnnxNet(tmp_path / "net.onnx", (1, 3), [(1, 3)])(values)[0], values)
    with pytest.raises(WeightsError, match="outputs"):
        OnnxNet(tmp_path / "net.onnx", (1, 3), [(1, 4)])(values)


def test_without_cuda_the_cpu_serves(tmp_path: Path):
    write_identity(tmp_path / "net.onnx", [1, 3])
    values = np.ones((1, 3), np.float32)
    np.testing.assert_array_equal(OnnxNet(tmp_path / "net.onnx", (1, 3), [(1, 3)], device="cuda:0")(values)[0], values)
