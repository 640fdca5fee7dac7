import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.animatediff.config import AnimateDiffConfig, AnimateDiffWeights
from engines.checkpoints import fingerprint
from engines.checkpoints.fingerprint import arithmetic_of, fingerprint_of
from engines.checkpoints.source import Source
from engines.diffusion.arithmetic import exact_arithmetic
from kernels.choice import forced
from tests.engines.controlnext.conftest import conditioning


@dataclass(frozen=True)
class One:
    a: Any
    b: Any = None


@dataclass(frozen=True)
class Other(One):
    pass


def test_the_same_values_have_the_same_fingerprint():
    assert fingerprint_of(conditioning(4)) == fingerprint_of(conditioning(4))
    assert fingerprint_of({"a": 1, "b": 2}) == fingerprint_of({"b": 2, "a": 1})
    strided = torch.arange(6.0).reshape(2, 3).T
    assert fingerprint_of(strided) == fingerprint_of(strided.contiguous())


def test_different_values_have_different_fingerprints():
    ones = torch.ones(2, 3)
    values = [
        None,
        0,
        False,
        "0",
        b"0",
        0.0,
        -0.0,
        (),
        (0,),
        ((0,),),
        ("ab", "c"),
        ("a", "bc"),
        {"a": 0},
        One(1, 2),
        One(2, 1),
        Other(1, 2),
        Path("0"),
        ones,
        ones.half(),
        ones.T,
        torch.zeros(2, 3),
        torch.tensor(1.0),
        replace(conditioning(4), seed=8),
        replace(conditioning(4), poses=conditioning(4).poses ^ 1),
        Source(repo="a/b", revision="1"),
        Source(repo="a/b", revision="2"),
    ]
    assert len({fingerprint_of(value) for value in values}) == len(values)


def test_what_cannot_be_told_apart_has_none():
    with pytest.raises(TypeError):
        fingerprint_of(object())


def test_weights_are_what_their_files_hold_wherever_they_lie(demo_weights: AnimateDiffWeights, tmp_path: Path):
    before = fingerprint_of(AnimateDiffConfig(weights=demo_weights))
    base = demo_weights.base.folder
    assert base is not None
    shutil.copytree(base, tmp_path / "elsewhere")
    moved = replace(demo_weights, base=replace(demo_weights.base, folder=tmp_path / "elsewhere"))
    assert fingerprint_of(AnimateDiffConfig(weights=moved)) == before
    file = next((tmp_path / "elsewhere").rglob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert fingerprint_of(AnimateDiffConfig(weights=moved)) != before
    assert fingerprint_of(AnimateDiffConfig(weights=demo_weights, dtype="float16")) != before


def test_the_arithmetic_of_a_cpu_is_told_by_its_threads():
    threads = torch.get_num_threads()
    one = arithmetic_of("cpu")
    torch.set_num_threads(threads + 1)
    try:
        assert fingerprint_of(arithmetic_of("cpu")) != fingerprint_of(one)
    finally:
        torch.set_num_threads(threads)


def test_the_arithmetic_of_a_gpu_is_told_by_its_libraries_and_the_kernels_choices(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    seen = {fingerprint_of(arithmetic_of("cuda"))}
    with forced("pytorch"):
        seen.add(fingerprint_of(arithmetic_of("cuda")))
    for owner, name, version in (
        (torch.backends.cudnn, "version", lambda: 1),
        (fingerprint.metadata, "version", lambda name: f"{name} 0"),
        (torch.cuda, "get_device_name", lambda device: "NVIDIA H100"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, version)
            seen.add(fingerprint_of(arithmetic_of("cuda")))
    assert len(seen) == 5


def test_a_process_sums_in_full_precision():
    exact_arithmetic()
    matmul = torch.backends.cuda.matmul
    flags = [matmul.allow_tf32, torch.backends.cudnn.allow_tf32, matmul.allow_fp16_reduced_precision_reduction]
    assert [*flags, matmul.allow_bf16_reduced_precision_reduction] == [False] * 4
