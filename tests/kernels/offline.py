"""Kernels compiled for GPUs that are not here: what a launch would need, read from the machine code.

Triton brings NVIDIA's assembler, so all of the way from Python to the GPU's own instructions runs on any machine; only their
speed cannot be known here. `tensorrt-triton.md`, section 7.
"""

import json
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import triton
from triton.runtime.cache import get_cache_manager

from kernels.triton.ahead import Compiled, compiled

TARGETS = (80, 90, 100)
"""Compute capabilities: A100, H100 and H200, B200. An L40S or RTX 4090 (89) is offered an A100's tiles and has its instructions
and registers, but less shared memory: see `SHARED_BYTES`."""
REPORT = "REELRAY_COMPILE_REPORT"
"""Environment variable with a file to which each compilation adds a line of JSON, for `report.py`."""
SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""What one block may have (CUDA C++ Programming Guide, table of technical specifications). For 80 it is what 89 has, less than
an A100's 163 KiB."""


_DESCRIPTION = "cuobjdump.txt"


@dataclass(frozen=True)
class Needs:
    """Of one block. registers: a thread's. shared: bytes. spills: loads and stores of those that did not fit. sass: the code."""

    registers: int
    shared: int
    spills: int
    sass: str

    @property
    def uses_matrix_units(self) -> bool:
        """Whether products are instructions of the tensor cores: HMMA, a warpgroup's HGMMA, or capability 100's UTCHMMA."""
        return bool(re.search(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b", self.sass))

    def count(self, instruction: str) -> int:
        """How often an instruction stands in the code, e.g. HGMMA."""
        return len(re.findall(rf"\b{instruction}\b", self.sass))


def needs(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    capability: int,
    *,
    num_warps: int = 4,
    num_stages: int = 3,
) -> Needs:
    """Compiles a `triton.jit` function. types: of its parameters that are no constants, by name, e.g. "*fp16" or "i32".

    All pointers are taken to be aligned to 16 bytes, as a tensor's are; all whole numbers too, which strides should be.
    """
    aligned = {name: f"{kind}:16" if kind[0] in "*i" else kind for name, kind in types.items()}
    found = needs_of(compiled(kernel, aligned, constants, capability, num_warps, num_stages))
    if (path := os.environ.get(REPORT)) is not None:
        about = {"kernel": f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}", "capability": capability}
        about |= {"warps": num_warps, "registers": found.registers, "shared": found.shared, "spills": found.spills}
        with Path(path).open("a") as lines:  # several processes compile: a line is one write
            lines.write(json.dumps(about) + "\n")
    return found


def needs_of(kernel: Compiled) -> Needs:
    """Of a kernel that is compiled. NVIDIA's description of it is kept in Triton's cache, beside the kernel."""
    cache = get_cache_manager(sha256(triton.__version__.encode() + kernel.cubin).hexdigest())
    kept = cache.get_file(_DESCRIPTION)
    said = Path(kept).read_text() if kept else _described(kernel.cubin)
    if not kept:
        cache.put(said, _DESCRIPTION, binary=False)
    registers = re.search(r"REG:(\d+)", said)
    assert registers is not None, said
    spills = len(re.findall(r"\b(?:LDL|STL)\b", said))
    return Needs(int(registers[1]), kernel.shared, spills, said)


def _described(cubin: bytes) -> str:
    """What a kernel uses, and its instructions."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(program), "--dump-resource-usage", "--dump-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
