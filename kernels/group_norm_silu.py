"""GroupNorm and the SiLU after it in two reads and one write of channels-last images; PyTorch takes three and two.

A clip's frames may share their statistics, as in motion modules and temporal convolutions: in channels-last memory a clip is
just a longer image.
"""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from kernels import reference
from kernels.choice import Shape, chosen, prefers_kernel


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    *,
    num_frames: int = 1,
    silu: bool = True,
    added: Tensor | None = None,
) -> Tensor:
    """silu((y - mean) / sqrt(var + eps) weight + bias) of y = x + added, mean and var of each group over its clip, in fp32.

    x: (B num_frames, C, H, W); our kernel copies it into channels-last memory if needed, and returns channels-last images.
    weight, bias: (C,). groups divides C. num_frames: how many consecutive images share statistics. silu: False is the norm alone.
    added: (C,) or None, e.g. the bias of the convolution before; adding it costs our kernel nothing, but PyTorch a pass: see
    `norms_by_kernel`.
    Group Normalization, arXiv 1803.08494, eq. 1; SiLU, arXiv 1606.08415, section 2.
    """
    assert x.ndim == 4, x.shape
    assert x.shape[0] % num_frames == 0, (x.shape, num_frames)
    assert x.shape[1] % groups == 0, (x.shape, groups)
    assert weight.shape == bias.shape == x.shape[1:2], (weight.shape, bias.shape, x.shape)
    assert added is None or added.shape == bias.shape, (added.shape, bias.shape)
    if norms_by_kernel(x, groups, num_frames, silu):
        return _op(x, weight, bias, groups, eps, num_frames, silu, added)
    x = x if added is None else x + added[:, None, None]
    return by_pytorch(x, weight, bias, groups, eps, num_frames, silu)


def norms_by_kernel(x: Tensor, groups: int, num_frames: int, silu: bool) -> bool:
    """Whether `group_norm_silu` runs our kernel for images like x. If so, a convolution before it should leave the bias to it."""
    return prefers_kernel("group_norm_silu", site(x, groups, num_frames, silu), x)


def by_pytorch(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, num_frames: int, silu: bool) -> Tensor:
    """`group_norm_silu` by PyTorch's operations. A clip's frames are one image of F H rows, a view if channels-last."""
    if num_frames == 1:
        y = F.group_norm(x, groups, weight, bias, eps)
        return F.silu(y, inplace=True) if silu else y
    rows = x.permute(0, 2, 3, 1).unflatten(0, (-1, num_frames)).flatten(1, 2)  # (B, F H, W, C)
    y = F.group_norm(rows.permute(0, 3, 1, 2), groups, weight, bias, eps)  # (B, C, F H, W)
    y = F.silu(y, inplace=True) if silu else y
    return y.permute(0, 2, 3, 1).unflatten(1, (num_frames, -1)).flatten(0, 1).permute(0, 3, 1, 2)


def site(x: Tensor, groups: int, num_frames: int, silu: bool) -> Shape:
    """Channels, pixels, groups, frames that share statistics, and whether there is a SiLU."""
    return x.shape[1], x.shape[2] * x.shape[3], groups, num_frames, int(silu)


@torch.library.custom_op("reelray::group_norm_silu", mutates_args=())
def _op(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, num_frames: int, silu: bool, added: Tensor | None
) -> Tensor:
    y = reference.group_norm_silu(x, weight, bias, groups, eps, num_frames=num_frames, silu=silu, added=added)
    return _like(x).copy_(y)


@_op.register_fake
def _like(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@_op.register_kernel("cuda")
def _launch(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, num_frames: int, silu: bool, added: Tensor | None
) -> Tensor:
    from kernels.triton.group_norm_silu import CUTS, launch  # late: Triton is optional

    cut = chosen("group_norm_silu", site(x, groups, num_frames, silu), x, CUTS) or CUTS[0]
    with torch.cuda.device_of(x):  # the device where Triton launches
        images = x.contiguous(memory_format=torch.channels_last)
        return launch(images, weight, bias, groups, eps, num_frames, silu, *cut, added=added)
