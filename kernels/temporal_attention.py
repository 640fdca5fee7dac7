"""Self-attention over the frames of a video, from the fused projection's layout to that of the next projection.

A library's attention needs (batch, heads, frames, D), but the video is (frames, positions, heads, D). It is a custom operation, a
single node for `torch.compile`, with two back ends: PyTorch's attention with the permutes that it needs, and on CUDA our kernel,
which reads and writes the video's own layout. Ours runs at the sites where it measured faster (`choice.py`).
"""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from kernels.choice import Shape, chosen, exports_natively


def temporal_attention(qkv: Tensor, num_frames: int, heads: int, position: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V for every position and head, over the frames.  arXiv 1706.03762, eq. 1.

    qkv: (B F, S, 3 C), any strides; C is heads x D. position: None, or (F or more, 3 C), of the same dtype; row f
    is added to the qkv of frame f. Returns (B F, S, C), contiguous. Raises `ValueError` if the shapes do not fit.
    """
    if exports_natively("temporal_attention"):
        return by_pytorch(qkv, num_frames, heads, position)
    return _operation(qkv, num_frames, heads, position)


def by_pytorch(qkv: Tensor, num_frames: int, heads: int, position: Tensor | None) -> Tensor:
    """`temporal_attention` by `scaled_dot_product_attention`. For one clip q, k and v are views, for more they are copies."""
    clips = qkv.unflatten(0, (-1, num_frames))  # (B, F, S, 3 C)
    if position is not None:
        clips = clips + position[:num_frames, None]
    if len(clips) > 1 and qkv.device.type == "cpu" and not torch.compiler.is_compiling():
        return torch.cat([by_pytorch(clip, num_frames, heads, None) for clip in clips])  # views, and small enough for the cache
    num_clips, _, positions, _ = clips.shape
    query, key, value = clips.unflatten(-1, (3, heads, -1)).permute(3, 0, 2, 4, 1, 5).flatten(1, 2)  # each (B S, heads, F, D)
    seen = F.scaled_dot_product_attention(query, key, value).unflatten(0, (num_clips, positions))
    return seen.permute(0, 3, 1, 2, 4).flatten(3).flatten(0, 1).contiguous()  # (B F, S, C)


def site(qkv: Tensor, num_frames: int, heads: int, position: Tensor | None) -> Shape:
    """Frames, positions, heads, head dimension, and whether there is a table."""
    return num_frames, qkv.shape[1], heads, qkv.shape[2] // 3 // heads, int(position is not None)


@torch.library.custom_op("reelray::temporal_attention", mutates_args=())
def _operation(qkv: Tensor, num_frames: int, heads: int, position: Tensor | None) -> Tensor:
    _check(qkv, num_frames, heads, position)
    return by_pytorch(qkv, num_frames, heads, position)


@_operation.register_fake
def _(qkv: Tensor, num_frames: int, heads: int, position: Tensor | None) -> Tensor:
    _check(qkv, num_frames, heads, position)
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3)


@_operation.register_kernel("cuda")
def _(qkv: Tensor, num_frames: int, heads: int, position: Tensor | None) -> Tensor:
    from kernels.triton.temporal_attention import launch, tiles_of

    _check(qkv, num_frames, heads, position)
    tiles = tiles_of(qkv, num_frames, heads)
    tile = chosen("temporal_attention", site(qkv, num_frames, heads, position), qkv, tiles)
    if tile is None:
        return by_pytorch(qkv, num_frames, heads, position)
    return launch(qkv, num_frames, heads, position, tile)


def _check(qkv: Tensor, num_frames: int, heads: int, position: Tensor | None) -> None:
    if num_frames < 1:
        raise ValueError(f"a clip has at least 1 frame, not {num_frames}")
    if qkv.ndim != 3 or qkv.shape[0] % num_frames or qkv.shape[2] % (3 * heads):
        raise ValueError(f"{tuple(qkv.shape)} is not (clips x {num_frames}, positions, 3 x {heads} x D)")
    if position is not None and (position.ndim != 2 or position.shape[0] < num_frames or position.shape[1] != qkv.shape[2]):
        raise ValueError(f"{tuple(position.shape)} has no row of {qkv.shape[2]} for each of {num_frames} frames")
    if position is not None and position.dtype != qkv.dtype:
        raise ValueError(f"{position.dtype} cannot be added to {qkv.dtype}")
