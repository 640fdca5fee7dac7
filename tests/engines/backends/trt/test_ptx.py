"""Kernels as PTX text for a TensorRT plan, assembled by NVIDIA's assembler for GPUs that are not present."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no triton: not verified that our kernels' PTX is fit for a plan")
import triton

from engines.backends.trt.plugin import MOST_SHARED_BYTES, kernel_of
from engines.backends.trt.ptx import POINTER, WHOLE, parameters, without_hidden
from engines.errors import EngineError
from kernels.triton.ahead import Compiled
from kernels.triton.temporal_attention import ahead, tiles
from tests.kernels.offline import TARGETS, Needs, needs_of

WHOLES = [WHOLE, WHOLE, WHOLE]
LARGEST = (16, 8, 40, True, "fp16")  # AnimateDiff's; of each: frames, heads, head dimension, whether there is a table, dtype
SVD = (24, 5, 64, False, "bf16")
CASES = [*((LARGEST, target, 1) for target in TARGETS), (SVD, 90, 2)]
AS_TRITON = "--regAllocOptLevel=2"
"""Triton passes this option to the assembler. As far as we know TensorRT does not."""
HEADER = """
.version 8.7
.target sm_90a
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u32 kernel_param_1,
	.param .u64 .ptr .global .align 1 kernel_param_2,
	.param .u64 .ptr .global .align 1 kernel_param_3
)
{
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b64 	%rd2, [kernel_param_2];
}
"""
"""Parameters: a pointer, an integer, a pointer, and a hidden pointer."""


def assembled(kernel: Compiled, folder: Path, *options: str) -> Needs:
    """Assembles the kernel's PTX. Returns what the machine code needs."""
    target = re.search(r"^\.target (sm_\w+)", kernel.ptx, re.MULTILINE)
    assert target is not None
    programs = Path(triton.__file__).parent / "backends/nvidia/bin"
    program = programs / ("ptxas-blackwell" if target[1].startswith("sm_10") else "ptxas")
    (folder / "kernel.ptx").write_text(kernel.ptx)
    command = [program, *options, "-lineinfo", f"--gpu-name={target[1]}", folder / "kernel.ptx", "-o", folder / "kernel.cubin"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return needs_of(replace(kernel, cubin=(folder / "kernel.cubin").read_bytes()))


@pytest.mark.parametrize(("site", "capability", "tactic"), CASES, ids=str)
def test_a_kernel_takes_its_arguments_alone_and_is_otherwise_the_same(
    site: tuple[int, int, int, bool, str], capability: int, tactic: int, tmp_path: Path
):
    frames, heads, head_dim, with_table, dtype = site
    whole = ahead(*site, capability, tiles(head_dim, capability)[tactic - 1])
    kernel = kernel_of(frames, heads, 3 * heads * head_dim, with_table, dtype, capability, tactic)
    assert parameters(kernel.ptx, kernel.entry) == [POINTER, *[POINTER] * with_table, *WHOLES, POINTER]
    assert len(parameters(whole.ptx, whole.entry)) == len(parameters(kernel.ptx, kernel.entry)) + 2, "Triton 3.7 hides two"
    changed = set(whole.ptx.splitlines()) ^ set(kernel.ptx.splitlines())
    assert all(".param .u64 .ptr" in line for line in changed)
    assert f".reqntid {kernel.threads}\n" in kernel.ptx
    assert kernel.shared <= MOST_SHARED_BYTES
    seen, expected = assembled(kernel, tmp_path, AS_TRITON), needs_of(whole)
    assert (seen.registers, seen.spills) == (expected.registers, 0)
    assert assembled(kernel, tmp_path).spills == 0


def test_loads_are_as_wide_as_in_a_launch_by_triton():
    kernel = kernel_of(16, 8, 960, True, "fp16", 90, 1)
    assert ".v4.b32" in kernel.ptx
    odd = kernel_of(
        16, 3, 3 * 3 * 8, True, "fp16", 90, 1
    )  # rows of 24 channels begin at multiples of 16 bytes, not of 16 channels
    assert parameters(odd.ptx, odd.entry) == [POINTER, POINTER, *WHOLES, POINTER]


def test_heads_that_no_tile_serves_are_refused():
    with pytest.raises(EngineError, match="head dimension 4 is no multiple"):
        kernel_of(16, 8, 96, True, "fp16", 90, 1)


def test_only_hidden_parameters_are_removed():
    seen = without_hidden(HEADER, "kernel", [POINTER, WHOLE, POINTER], 0)
    assert seen == HEADER.replace(",\n	.param .u64 .ptr .global .align 1 kernel_param_3", "")
    assert without_hidden(seen, "kernel", [POINTER, WHOLE, POINTER], 0) == seen, "a Triton that adds no hidden parameters"


@pytest.mark.parametrize(
    ("ptx", "arguments", "scratch", "words"),
    [
        (HEADER, [POINTER, WHOLE, POINTER], 128, "wants 128 bytes from its launcher"),
        (HEADER, [POINTER, WHOLE, WHOLE], 0, "and not"),
        (HEADER, [POINTER, WHOLE, POINTER, POINTER, POINTER], 0, "and not"),
        (HEADER, [POINTER, WHOLE], 0, "kernel_param_2 of kernel is more than an unused pointer"),
        (HEADER, [POINTER], 0, "kernel_param_1 of kernel is more than an unused pointer"),
        (HEADER.replace("kernel(", "other("), [POINTER], 0, "not one entry kernel"),
        (HEADER + HEADER, [POINTER], 0, "not one entry kernel"),
        (HEADER.replace("	.param .u32 kernel_param_1", "	.reg .u32 r"), [POINTER], 0, "is no parameter"),
        ("", [POINTER], 0, "not one entry kernel"),
    ],
    ids=["scratch", "another type", "too few", "read", "no pointer", "another name", "two", "no parameter", "nothing"],
)
def test_what_cannot_be_launched_with_its_arguments_is_refused(ptx: str, arguments: list[str], scratch: int, words: str):
    with pytest.raises(EngineError, match=words):
        without_hidden(ptx, "kernel", arguments, scratch)
