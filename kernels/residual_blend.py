"""What follows a layer's last product, in one pass: its bias, the residual, and SVD's learned blend of space and time.

The blend factors of SVD's convolutions are folded into their weights, so those sites are residuals alone; after a temporal
block the blend remains, with a residual before it: tokens of the spatial path, of the temporal path, and the feed-forward's.
"""

import torch
from torch import Tensor

from kernels import reference


def residual_add(h: Tensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
    """residual + h + bias, added in fp32.

    h, residual: (..., C), on a GPU contiguous; images in channels-last memory come as x.permute(0, 2, 3, 1), which is free.
    bias: (C,), or (N, C) for the N entries of the first axis, or None.
    """
    return _op(*_checked(h, residual, bias), None, None)


def residual_blend(h: Tensor, residual: Tensor, other: Tensor, mix: Tensor, bias: Tensor | None = None) -> Tensor:
    """mix other + (1 - mix) (residual + h + bias), computed in fp32. Stable Video Diffusion, arXiv 2311.15127, appendix D.

    h, residual, bias: as in `residual_add`. other: (..., C), the spatial path. mix: (1,), fp32, its share.
    """
    assert other.shape == h.shape, (other.shape, h.shape)
    assert mix.shape == (1,), mix.shape
    assert mix.dtype == torch.float32, mix.dtype
    return _op(*_checked(h, residual, bias), other, mix)


def _checked(h: Tensor, residual: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    assert residual.shape == h.shape, (residual.shape, h.shape)
    assert bias is None or bias.shape in (h.shape[-1:], (h.shape[0], h.shape[-1])), (bias.shape, h.shape)
    return h, residual, bias


@torch.library.custom_op("reelray::residual_blend", mutates_args=())
def _op(h: Tensor, residual: Tensor, bias: Tensor | None, other: Tensor | None, mix: Tensor | None) -> Tensor:
    return _like(h).copy_(reference.residual_blend(h, residual, bias, other, mix))


@_op.register_fake
def _like(h: Tensor, *_: object) -> Tensor:
    return h.new_empty(h.shape)


@_op.register_kernel("cuda")
def _launch(h: Tensor, residual: Tensor, bias: Tensor | None, other: Tensor | None, mix: Tensor | None) -> Tensor:
    from kernels.triton.residual_blend import launch  # late: Triton is optional

    with torch.cuda.device_of(h):  # where Triton launches
        return launch(h, residual, bias, other, mix)
