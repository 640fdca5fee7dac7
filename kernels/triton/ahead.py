"""Compiles a kernel before any launch, for a GPU that may be absent, and tells what a launcher other than Triton's needs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

THREADS = 32
"""Threads of a warp."""


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel.

    entry: its name in `ptx`. threads: of a block. shared: bytes of shared memory of a block. scratch: bytes of memory that the
    launcher must provide; Triton adds pointers for it after the arguments, even if it needs none.
    """

    entry: str
    ptx: str
    cubin: bytes
    threads: int
    shared: int
    scratch: int


def compiled(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], capability: int, num_warps: int, num_stages: int
) -> Compiled:
    """Compiles a `triton.jit` function. capability: 90 for an H200.

    types: of the parameters that are not constants, by name: "*fp16" or "i32"; "*fp16:16" or "i32:16" if the address or the
    number is a multiple of 16. Without that, loads are narrow.
    """
    names = list(kernel.arg_names)
    signature = {name: types.get(name, "constexpr").removesuffix(":16") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in types.items() if kind.endswith(":16")}
    source = ASTSource(kernel, signature, values, aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    made = triton.compile(source, target=GPUTarget("cuda", capability, THREADS), options=options)
    about = made.metadata
    scratch = sum(getattr(about, f"{kind}_scratch_size", 0) for kind in ("global", "profile"))
    return Compiled(about.name, made.asm["ptx"], made.asm["cubin"], about.num_warps * THREADS, about.shared, scratch)
