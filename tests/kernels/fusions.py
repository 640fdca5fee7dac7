"""Shared by the tests of the memory-bound kernels: inputs, tolerances, and requirements on the compiled code."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.kernels.offline import SHARED_BYTES, needs

TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
HALVES = (torch.float16, torch.bfloat16)
MOST_REGISTERS = 96
"""With 128 threads each, five blocks fit a multiprocessor. So 25 kB can be in flight at once, which hides the latency of HBM3."""


def values(*shape: int, dtype: torch.dtype = torch.float64, offset: float = 0.0, seed: int = 0) -> Tensor:
    """Normally distributed about `offset`."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset).to(dtype)


def error(ours: Tensor, expected: Tensor) -> float:
    """The greatest difference, relative to the greatest expected value where that is above 1."""
    return ((ours.double() - expected.double()).abs().max() / max(1.0, expected.abs().max().item())).item()


def assert_streams(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], capability: int, warps: int, *, wide: bool = True
) -> None:
    """Asserts that the kernel fits the card without spills and, if `wide`, loads and stores 16 bytes per thread."""
    found = needs(kernel, types, constants, capability, num_warps=warps)
    assert found.spills == 0
    assert found.registers * warps <= MOST_REGISTERS * 4, found.registers
    assert found.shared <= SHARED_BYTES[capability]
    if wide:
        assert found.count(r"LDG\.E(?:\.\w+)*\.128") >= 1, found.sass
        assert found.count(r"LDG\.E(?:\.\w+)*\.(?:U16|U8)") == 0
