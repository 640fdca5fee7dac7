"""GroupNorm and the SiLU after it in two reads and one write of channels-last images; PyTorch's takes three and two.

A clip's frames may share their statistics, as in motion modules and temporal convolutions: in channels-last memory a clip is
just a longer image.
"""

import torch
from torch import Tensor

from kernels import reference


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-5, *, num_frames: int = 1, silu: bool = True
) -> Tensor:
    """silu((x - mean) / sqrt(var + eps) weight + bias), mean and var of each group of channels over its clip, in fp32.

    x: (B num_frames, C, H, W), on a GPU in channels-last memory, as the result is. weight, bias: (C,). groups divides C.
    num_frames: how many consecutive images share statistics. silu: without it, the norm alone.
    Group Normalization, arXiv 1803.08494, eq. 1; SiLU, arXiv 1606.08415, section 2.
    """
    assert x.ndim == 4, x.shape
    assert x.shape[0] % num_frames == 0, (x.shape, num_frames)
    assert x.shape[1] % groups == 0, (x.shape, groups)
    assert weight.shape == bias.shape == x.shape[1:2], (weight.shape, bias.shape, x.shape)
    return _op(x, weight, bias, groups, eps, num_frames, silu)


@torch.library.custom_op("reelray::group_norm_silu", mutates_args=())
def _op(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, num_frames: int, silu: bool) -> Tensor:
    return _like(x).copy_(reference.group_norm_silu(x, weight, bias, groups, eps, num_frames=num_frames, silu=silu))


@_op.register_fake
def _like(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@_op.register_kernel("cuda")
def _launch(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, num_frames: int, silu: bool) -> Tensor:
    from kernels.triton.group_norm_silu import launch  # late: Triton is optional

    with torch.cuda.device_of(x):  # where Triton launches
        return launch(x, weight, bias, groups, eps, num_frames, silu)
