"""Scaled dot-product attention: the one door through which every attention of ours goes.

Today it leads to PyTorch's own fused kernels; a back end of ours is used at a site only where it measured faster there.
"""

from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V.  Attention Is All You Need, arXiv 1706.03762, eq. 1.

    query: (B, heads, N, D); key, value: (B, heads, M, D), one dtype. Returns (B, heads, N, D).
    """
    return F.scaled_dot_product_attention(query, key, value)
