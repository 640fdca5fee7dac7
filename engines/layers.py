"""What the UNets of both families share: how diffusers' parameters are taken over into fewer, larger operations."""

from typing import Any

import torch
from torch import Tensor, nn


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer that holds these parameters. weight: (out, in)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def fused_qkv(source: Any) -> nn.Linear:
    """The three projections of a self-attention (diffusers' `Attention`) as one GEMM, (..., C) -> (..., 3 C)."""
    return linear(torch.cat([source.to_q.weight, source.to_k.weight, source.to_v.weight]), None)


class Slots:
    """Hands out consecutive numbers to the layers of a net, in the order in which they are built."""

    def __init__(self) -> None:
        self.used = 0

    def take(self, count: int = 1) -> int:
        """The first of the next `count` numbers."""
        first = self.used
        self.used += count
        return first
