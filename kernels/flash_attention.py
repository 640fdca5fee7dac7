"""Attention on tokens with their heads side by side, as the projections write them, for head dimensions such as 40, 80 and 160.

On CUDA it is a kernel of ours whose tiles are as wide as the head; elsewhere it is the reference. Where several images share
their keys and values (the frames of a clip and its text), fold them into the queries: (F, N, heads, D) is (1, F N, heads, D).
"""

import torch
from torch import Tensor

from kernels import reference
from kernels.attention import attention


def flash_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V for every head.  Attention Is All You Need, arXiv 1706.03762, eq. 1.

    query: (B, N, heads, D); key, value: (B, M, heads, D), one dtype, any strides, D a multiple of 8, on CUDA of 160 at most.
    Heads that do not lie side by side are copied first; views of (B, N, C) and of a fused projection are not.
    Returns (B, N, heads, D), contiguous. On CUDA halves are computed by the kernel, with scores and sums in fp32; other dtypes
    by PyTorch's. Raises `ValueError` where the shapes do not fit.
    """
    return _operation(query, key, value)


@torch.library.custom_op("reelray::flash_attention", mutates_args=())
def _operation(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    _check(query, key, value)
    return reference.flash_attention(query, key, value)


@_operation.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    _check(query, key, value)
    return query.new_empty(query.shape)


@_operation.register_kernel("cuda")
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from kernels.triton.flash_attention import launch

    _check(query, key, value)
    if query.element_size() != 2:  # no tensor cores: the tiles spill
        seen = attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        return seen.transpose(1, 2).contiguous()
    return launch(query, key, value)


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.ndim != 4 or key.shape != value.shape or key.ndim != 4 or query.shape[3] % 8:
        raise ValueError(
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)} are not tokens of heads of a multiple of 8"
        )
    if (query.shape[0], *query.shape[2:]) != (key.shape[0], *key.shape[2:]):
        raise ValueError(f"{tuple(query.shape)} and {tuple(key.shape)} differ in batch, heads or head dimension")
    if key.shape[1] < 1:
        raise ValueError("a softmax over no keys is nothing")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"{query.dtype}, {key.dtype} and {value.dtype} are not one dtype")
