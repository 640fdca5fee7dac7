"""LayerNorm of tokens and the addition of a position table after it, in one pass."""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from kernels import reference
from kernels.choice import Shape, chosen, prefers_kernel


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, positions: Tensor | None = None, axis: int = 0
) -> Tensor:
    """(x - mean) / sqrt(var + eps) weight + bias + positions[i], mean and var over the channels of a token, in fp32.

    x: (..., C). weight, bias: (C,). positions: (P, C) or None; i is a token's index along `axis` of x, which
    has at most P entries and is 0 for (F, L, C) and 1 for (B L, F, C). Layer Normalization, arXiv 1607.06450, eq. 4.
    """
    assert weight.shape == bias.shape == x.shape[-1:], (weight.shape, bias.shape, x.shape)
    assert 0 <= axis < x.ndim - 1, (axis, x.shape)
    if positions is not None:
        assert positions.shape[1:] == x.shape[-1:], (positions.shape, x.shape)
        assert positions.shape[0] >= x.shape[axis], (positions.shape, x.shape)
    if prefers_kernel("layer_norm", site(x, positions), x):
        return _op(x, weight, bias, eps, positions, axis)
    y = F.layer_norm(x, weight.shape, weight, bias, eps)
    if positions is None:
        return y
    between = (1,) * (x.ndim - 2 - axis)
    return y.add_(positions[: x.shape[axis]].unflatten(0, (-1, *between)))  # (length, 1, ..., 1, C)


def site(x: Tensor, positions: Tensor | None) -> Shape:
    """The last two sizes, tokens and channels, and whether there are positions."""
    return x.shape[-2], x.shape[-1], int(positions is not None)


@torch.library.custom_op("reelray::layer_norm", mutates_args=())
def _op(x: Tensor, weight: Tensor, bias: Tensor, eps: float, positions: Tensor | None, axis: int) -> Tensor:
    return _like(x).copy_(reference.layer_norm(x, weight, bias, eps, positions=positions, axis=axis))


@_op.register_fake
def _like(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


@_op.register_kernel("cuda")
def _launch(x: Tensor, weight: Tensor, bias: Tensor, eps: float, positions: Tensor | None, axis: int) -> Tensor:
    from kernels.triton.layer_norm import VALUES, launch  # late: Triton is optional

    tile = chosen("layer_norm", site(x, positions), x, VALUES) or VALUES[0]
    with torch.cuda.device_of(x):  # the device where Triton launches
        return launch(x.contiguous(), weight, bias, eps, positions, axis, tile)
