"""LayerNorm of tokens and the addition of a position table after it, in one pass."""

import torch
from torch import Tensor

from kernels import reference


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, positions: Tensor | None = None, axis: int = 0
) -> Tensor:
    """(x - mean) / sqrt(var + eps) weight + bias + positions[i], mean and var over the channels of a token, in fp32.

    x: (..., C), on a GPU contiguous. weight, bias: (C,). positions: (P, C) or None; i is a token's index along `axis` of x,
    0 for (F, L, C) and 1 for (B L, F, C), of no more than P. Layer Normalization, arXiv 1607.06450, eq. 4.
    """
    assert weight.shape == bias.shape == x.shape[-1:], (weight.shape, bias.shape, x.shape)
    assert 0 <= axis < x.ndim - 1, (axis, x.shape)
    if positions is not None:
        assert positions.shape[1:] == x.shape[-1:], (positions.shape, x.shape)
        assert positions.shape[0] >= x.shape[axis], (positions.shape, x.shape)
    return _op(x, weight, bias, eps, positions, axis)


@torch.library.custom_op("reelray::layer_norm", mutates_args=())
def _op(x: Tensor, weight: Tensor, bias: Tensor, eps: float, positions: Tensor | None, axis: int) -> Tensor:
    return _like(x).copy_(reference.layer_norm(x, weight, bias, eps, positions=positions, axis=axis))


@_op.register_fake
def _like(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


@_op.register_kernel("cuda")
def _launch(x: Tensor, weight: Tensor, bias: Tensor, eps: float, positions: Tensor | None, axis: int) -> Tensor:
    from kernels.triton.layer_norm import launch  # late: Triton is optional

    with torch.cuda.device_of(x):  # where Triton launches
        return launch(x, weight, bias, eps, positions, axis)
