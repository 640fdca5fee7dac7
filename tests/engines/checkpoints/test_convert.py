import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engines.checkpoints.convert import convert_weights
from engines.errors import WeightsError


class Trap:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_tensors_keep_their_names_shapes_and_dtypes(tmp_path: Path):
    tensors = {"a": torch.rand(2, 3), "b": torch.arange(4), "c": torch.rand(2, dtype=torch.float16)}
    torch.save(tensors, tmp_path / "in.bin")
    convert_weights(tmp_path / "in.bin", tmp_path / "new" / "out.safetensors")
    written = load_file(tmp_path / "new" / "out.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], value) and written[name].dtype == value.dtype for name, value in tensors.items())


def test_only_floating_point_is_cast(tmp_path: Path):
    torch.save({"a": torch.rand(2), "b": torch.arange(4)}, tmp_path / "in.bin")
    written = convert_weights(tmp_path / "in.bin", tmp_path / "out.safetensors", "bfloat16")
    assert (written["a"].dtype, written["b"].dtype) == (torch.bfloat16, torch.int64)


def test_views_of_one_memory_and_other_layouts_are_written_whole(tmp_path: Path):
    base = torch.rand(4, 4)
    torch.save({"a": base[:2], "b": base.t(), "c": base}, tmp_path / "in.bin")
    convert_weights(tmp_path / "in.bin", tmp_path / "out.safetensors")
    assert torch.equal(load_file(tmp_path / "out.safetensors")["b"], base.t())


def test_the_old_format_and_a_nested_state_dict_are_read(tmp_path: Path):
    torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": 3}, tmp_path / "in.ckpt", _use_new_zipfile_serialization=False)
    assert convert_weights(tmp_path / "in.ckpt", tmp_path / "out.safetensors").keys() == {"a"}


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, zipped: bool):
    trap = tmp_path / "sprung"
    torch.save({"a": torch.ones(1), "b": Trap(trap)}, tmp_path / "in.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match="holds more than tensors"):
        convert_weights(tmp_path / "in.bin", tmp_path / "out.safetensors")
    assert not trap.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["in.bin"]


@pytest.mark.parametrize("content", [{}, [torch.ones(1)], {"a": 3}, {1: torch.ones(1)}, torch.ones(2)])
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: object):
    torch.save(content, tmp_path / "in.bin")
    with pytest.raises(WeightsError, match="tensor"):
        convert_weights(tmp_path / "in.bin", tmp_path / "out.safetensors")


@pytest.mark.parametrize("data", [b"", b"text", pickle.dumps({"a": 1})[:-3], b"PK\x03\x04 broken"])
def test_what_is_no_torch_file_is_refused(tmp_path: Path, data: bytes):
    (tmp_path / "in.bin").write_bytes(data)
    with pytest.raises(WeightsError):
        convert_weights(tmp_path / "in.bin", tmp_path / "out.safetensors")


def test_a_truncated_file_is_refused(tmp_path: Path):
    torch.save({"a": torch.rand(1000)}, tmp_path / "in.bin")
    (tmp_path / "in.bin").write_bytes((tmp_path / "in.bin").read_bytes()[:-500])
    with pytest.raises(WeightsError, match="cannot be read"):
        convert_weights(tmp_path / "in.bin", tmp_path / "out.safetensors")


def test_the_target_must_be_named_as_what_it_is(tmp_path: Path):
    with pytest.raises(WeightsError, match=r"name a \.safetensors file"):
        convert_weights(tmp_path / "in.bin", tmp_path / "out.bin")
