"""What each operation must equal, in plain PyTorch."""

from torch import Tensor


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`kernels.attention.attention` by its equation. Shapes as there; the scores are materialised."""
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5  # (B, heads, N, M)
    return scores.softmax(dim=-1) @ value
