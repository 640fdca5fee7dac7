"""Shared by the tests of exact savings: random values in float64, and a check that two results differ only by rounding."""

import torch
from torch import Tensor

ROUNDING = 1e-11


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_rounding(a: Tensor, b: Tensor):
    assert a.std() > 1e-3, "nearly constant values: the comparison would show nothing"
    assert (a - b).abs().max() <= ROUNDING
