"""What each operation must equal, in plain PyTorch."""

from torch import Tensor


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`kernels.attention.attention` by its equation. Shapes as there; the scores are materialised."""
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5  # (B, heads, N, M)
    return scores.softmax(dim=-1) @ value


def temporal_attention(qkv: Tensor, num_frames: int, heads: int, position: Tensor | None = None) -> Tensor:
    """`kernels.temporal_attention.temporal_attention` by its equation: every position's frames attend to one another."""
    clips = qkv.unflatten(0, (-1, num_frames))  # (B, F, S, 3 C)
    if position is not None:
        clips = clips + position[:num_frames, None]
    query, key, value = clips.unflatten(-1, (3, heads, -1)).permute(3, 0, 2, 4, 1, 5)  # each (B, S, heads, F, D)
    return attention(query, key, value).permute(0, 3, 1, 2, 4).flatten(3).flatten(0, 1).contiguous()


def flash_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`kernels.flash_attention.flash_attention` by its equation, which is `attention` on another layout."""
    return attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2).contiguous()
