"""GEGLU's product in one pass over the fused projection; in PyTorch gelu writes a tensor that the multiplication reads again."""

import torch
from torch import Tensor

from kernels import reference


def geglu(x: Tensor) -> Tensor:
    """a gelu(g), computed in fp32, with gelu(g) = g (1 + erf(g / sqrt 2)) / 2.

    x: (..., 2 D), the projection: a beside g, on a GPU contiguous. Returns (..., D). GLU Variants, arXiv 2002.05202, eq. 6.
    """
    assert x.shape[-1] % 2 == 0, x.shape
    return _op(x)


@torch.library.custom_op("reelray::geglu", mutates_args=())
def _op(x: Tensor) -> Tensor:
    return reference.geglu(x)


@_op.register_fake
def _like(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@_op.register_kernel("cuda")
def _launch(x: Tensor) -> Tensor:
    from kernels.triton.geglu import launch  # late: Triton is optional

    with torch.cuda.device_of(x):  # where Triton launches
        return launch(x)
