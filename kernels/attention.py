"""Attention on tokens with their heads side by side, as the projections write them; over frames see `temporal_attention.py`.

It is a custom operation, a single node for `torch.compile`, with two back ends: PyTorch's fused kernels, and on CUDA our kernel,
whose tiles fit heads of 40, 80 and 160. Ours runs at the sites where it measured faster (`choice.py`). Where several images share
their keys and values (the frames of a clip and its text), fold them into the queries: (F, N, heads, D) is (1, F N, heads, D).
"""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from kernels.choice import Shape, chosen, exports_natively


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V for every head.  Attention Is All You Need, arXiv 1706.03762, eq. 1.

    query: (B, N, heads, D); key, value: (B, M, heads, D), one dtype, any strides. Our kernel copies inputs whose heads do
    not lie side by side; in views of (B, N, C) and of a fused projection they do. Returns (B, N, heads, D), contiguous. Raises
    `ValueError` if the shapes do not fit.
    """
    if exports_natively("attention"):
        return by_pytorch(query, key, value)
    return _operation(query, key, value)


def by_pytorch(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`attention` by `scaled_dot_product_attention`, which keeps the layout: nothing is copied on a CPU."""
    seen = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return seen.transpose(1, 2).contiguous()


def site(query: Tensor, key: Tensor) -> Shape:
    """Queries, keys, heads and head dimension."""
    return query.shape[1], key.shape[1], query.shape[2], query.shape[3]


@torch.library.custom_op("reelray::attention", mutates_args=())
def _operation(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    _check(query, key, value)
    return by_pytorch(query, key, value)


@_operation.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    _check(query, key, value)
    return query.new_empty(query.shape)


@_operation.register_kernel("cuda")
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from kernels.triton.flash_attention import launch, tiles_of

    _check(query, key, value)
    tile = chosen("attention", site(query, key), query, tiles_of(query))
    return by_pytorch(query, key, value) if tile is None else launch(query, key, value, tile)


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.ndim != 4 or key.shape != value.shape or key.ndim != 4:
        raise ValueError(f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)} are not queries, keys and values")
    if (query.shape[0], *query.shape[2:]) != (key.shape[0], *key.shape[2:]):
        raise ValueError(f"{tuple(query.shape)} and {tuple(key.shape)} differ in batch, heads or head dimension")
    if key.shape[1] < 1:
        raise ValueError("there are no keys to attend to")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"{query.dtype}, {key.dtype} and {value.dtype} are not one dtype")
