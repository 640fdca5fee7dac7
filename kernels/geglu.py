"""GEGLU's product in one pass over the fused projection; in PyTorch gelu writes a tensor that the multiplication reads again."""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from kernels import reference
from kernels.choice import Shape, chosen, prefers_kernel


def geglu(x: Tensor) -> Tensor:
    """a gelu(g), computed in fp32, with gelu(g) = g (1 + erf(g / sqrt 2)) / 2.

    x: (..., 2 D), the projection: a, then g. Returns (..., D). GLU Variants, arXiv 2002.05202, eq. 6.
    """
    assert x.shape[-1] % 2 == 0, x.shape
    if prefers_kernel("geglu", site(x), x):
        return _op(x)
    a, g = x.chunk(2, dim=-1)
    return F.gelu(g).mul_(a)


def site(x: Tensor) -> Shape:
    """The last two sizes: tokens and twice the width."""
    return x.shape[-2], x.shape[-1]


@torch.library.custom_op("reelray::geglu", mutates_args=())
def _op(x: Tensor) -> Tensor:
    return reference.geglu(x)


@_op.register_fake
def _like(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@_op.register_kernel("cuda")
def _launch(x: Tensor) -> Tensor:
    from kernels.triton.geglu import TILES, launch  # late: Triton is optional

    tile = chosen("geglu", site(x), x, TILES) or TILES[0]
    with torch.cuda.device_of(x):  # the device where Triton launches
        return launch(x.contiguous(), tile)
