"""What the tests of exact savings share: values in float64, and how far rounding may take them apart."""

import torch
from torch import Tensor

ROUNDING = 1e-11


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_rounding(a: Tensor, b: Tensor):
    assert a.std() > 1e-3, "a comparison of nothing proves nothing"
    assert (a - b).abs().max() <= ROUNDING
