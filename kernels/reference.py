"""The reference of each operation in plain PyTorch, to test it against. Shapes are those of the operation of the same name."""

import torch
from torch import Tensor


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`kernels.attention.attention` by its equation."""
    return _attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2).contiguous()


def temporal_attention(qkv: Tensor, num_frames: int, heads: int, position: Tensor | None = None) -> Tensor:
    """`kernels.temporal_attention.temporal_attention` by its equation: every position's frames attend to one another."""
    clips = qkv.unflatten(0, (-1, num_frames))  # (B, F, S, 3 C)
    if position is not None:
        clips = clips + position[:num_frames, None]
    query, key, value = clips.unflatten(-1, (3, heads, -1)).permute(3, 0, 2, 4, 1, 5)  # each (B, S, heads, F, D)
    return _attention(query, key, value).permute(0, 3, 1, 2, 4).flatten(3).flatten(0, 1).contiguous()


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention that stores all scores. query: (..., N, D); key, value: (..., M, D)."""
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5  # (..., N, M)
    return scores.softmax(dim=-1) @ value


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    num_frames: int = 1,
    silu: bool = True,
    added: Tensor | None = None,
) -> Tensor:
    """`kernels.group_norm_silu.group_norm_silu` by its equation."""
    y = _wide(x) if added is None else _wide(x) + added[:, None, None]
    clips = y.unflatten(0, (-1, num_frames)).unflatten(2, (groups, -1))  # (B, F, G, C / G, H, W)
    var, mean = torch.var_mean(clips, dim=(1, 3, 4, 5), correction=0, keepdim=True)
    y = ((clips - mean) / (var + eps).sqrt()).flatten(2, 3).flatten(0, 1)  # (B F, C, H, W)
    y = y * weight[:, None, None] + bias[:, None, None]
    return (y * y.sigmoid() if silu else y).to(x.dtype)


def geglu(x: Tensor) -> Tensor:
    """`kernels.geglu.geglu` by its equation."""
    a, g = _wide(x).chunk(2, dim=-1)
    return (a * g * (1 + torch.erf(g / 2**0.5)) / 2).to(x.dtype)


def residual_blend(h: Tensor, residual: Tensor, bias: Tensor | None, other: Tensor | None, mix: Tensor | None) -> Tensor:
    """`kernels.residual_blend`'s two functions by their equations; `residual_add` is the one with other and mix None."""
    y = _wide(h) + residual
    if bias is not None:
        y = y + (bias if bias.ndim == 1 else bias.unflatten(0, (-1,) + (1,) * (h.ndim - 2)))
    if other is not None:
        assert mix is not None
        y = mix * _wide(other) + (1 - mix) * y
    return y.to(h.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, positions: Tensor | None = None, axis: int = 0) -> Tensor:
    """`kernels.layer_norm.layer_norm` by its equation."""
    var, mean = torch.var_mean(_wide(x), dim=-1, correction=0, keepdim=True)
    y = (x - mean) / (var + eps).sqrt() * weight + bias
    if positions is not None:
        between = (1,) * (x.ndim - 2 - axis)
        y = y + positions[: x.shape[axis]].unflatten(0, (-1, *between))  # (length, 1, ..., 1, C)
    return y.to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """At least fp32, as the kernels compute."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
