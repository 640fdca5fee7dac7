"""What follows a layer's last product, in one pass: its bias, the residual, and SVD's learned blend of space and time.

The blend factors of SVD's convolutions are folded into their weights, so those sites only add a residual. After a temporal block
the blend remains, and a residual before it: its inputs are tokens of the spatial path, the temporal path and the feed-forward.
"""

from math import prod

import torch
from torch import Tensor

from kernels import reference
from kernels.choice import Shape, chosen, prefers_kernel


def residual_add(h: Tensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
    """residual + h + bias, added in fp32.

    h, residual: (..., C); pass images in channels-last memory as x.permute(0, 2, 3, 1), which is free.
    bias: (C,), or (N, C) for the N entries of the first axis, or None.
    """
    _check(h, residual, bias)
    if adds_by_kernel(residual, bias):
        return _op(h, residual, bias, None, None)
    return _added(h, residual, bias)


def residual_blend(h: Tensor, residual: Tensor, other: Tensor, mix: Tensor, bias: Tensor | None = None) -> Tensor:
    """mix other + (1 - mix) (residual + h + bias), computed in fp32. Stable Video Diffusion, arXiv 2311.15127, appendix D.

    h, residual, bias: as in `residual_add`. other: (..., C), the spatial path. mix: (1,), fp32 or wider, its share.
    """
    assert other.shape == h.shape, (other.shape, h.shape)
    assert mix.shape == (1,), mix.shape
    assert mix.element_size() >= 4, mix.dtype
    _check(h, residual, bias)
    if prefers_kernel("residual_blend", site(h, bias, other), h):
        return _op(h, residual, bias, other, mix)
    return torch.lerp(_added(h, residual, bias), other, mix.to(h.dtype))


def adds_by_kernel(residual: Tensor, bias: Tensor | None) -> bool:
    """Whether `residual_add` runs our kernel here. If so, its caller should leave the bias to it."""
    return prefers_kernel("residual_blend", site(residual, bias, None), residual)


def site(h: Tensor, bias: Tensor | None, other: Tensor | None) -> Shape:
    """Entries of one image, channels, whether there is a bias, and whether there is a blend."""
    return prod(h.shape[1:-1]), h.shape[-1], int(bias is not None), int(other is not None)


def _added(h: Tensor, residual: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return residual + h
    return residual + (h + (bias if bias.ndim == 1 else bias.unflatten(0, (-1,) + (1,) * (h.ndim - 2))))


def _check(h: Tensor, residual: Tensor, bias: Tensor | None) -> None:
    assert residual.shape == h.shape, (residual.shape, h.shape)
    assert bias is None or bias.shape in (h.shape[-1:], (h.shape[0], h.shape[-1])), (bias.shape, h.shape)


@torch.library.custom_op("reelray::residual_blend", mutates_args=())
def _op(h: Tensor, residual: Tensor, bias: Tensor | None, other: Tensor | None, mix: Tensor | None) -> Tensor:
    return _like(h).copy_(reference.residual_blend(h, residual, bias, other, mix))


@_op.register_fake
def _like(h: Tensor, *_: object) -> Tensor:
    return h.new_empty(h.shape)


@_op.register_kernel("cuda")
def _launch(h: Tensor, residual: Tensor, bias: Tensor | None, other: Tensor | None, mix: Tensor | None) -> Tensor:
    from kernels.triton.residual_blend import TILES, launch  # late: Triton is optional

    tile = chosen("residual_blend", site(h, bias, other), h, TILES) or TILES[0]
    with torch.cuda.device_of(h):  # the device where Triton launches
        h, residual = h.contiguous(), residual.contiguous()
        other, mix = (None, None) if other is None or mix is None else (other.contiguous(), mix.float())
        return launch(h, residual, bias, other, mix, tile)
