"""Self-attention over the frames of a video, straight from the fused projection and straight into the next one.

A library's attention wants (batch, heads, frames, D), where the video is (frames, positions, heads, D): two passes over memory
that do nothing but permute. On CUDA this is one kernel of ours that reads and writes the video's own layout; elsewhere it is the
reference. It is a custom operation, so that `torch.compile` and `torch.export` see one node.
"""

import torch
from torch import Tensor

from kernels import reference

MOST_FRAMES = 32
"""AnimateDiff's motion modules have positions for no more, and SVD works in windows of 25 at most."""


def temporal_attention(qkv: Tensor, num_frames: int, heads: int, position: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V for every position and head, over the frames.  arXiv 1706.03762, eq. 1.

    qkv: (B F, S, 3 C), any strides; C is heads x D, D a multiple of 8, on CUDA of 160 at most. position: (F or more, 3 C), of the
    same dtype, added to every position's qkv by its frame; or None. Returns (B F, S, C), contiguous. On CUDA halves are computed
    by the kernel, with scores and sums in fp32; other dtypes by the reference. Raises `ValueError` where the shapes do not fit,
    or for more than 32 frames.
    """
    return _operation(qkv, num_frames, heads, position)


@torch.library.custom_op("reelray::temporal_attention", mutates_args=())
def _operation(qkv: Tensor, num_frames: int, heads: int, position: Tensor | None) -> Tensor:
    _check(qkv, num_frames, heads, position)
    return reference.temporal_attention(qkv, num_frames, heads, position)


@_operation.register_fake
def _(qkv: Tensor, num_frames: int, heads: int, position: Tensor | None) -> Tensor:
    _check(qkv, num_frames, heads, position)
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3)


@_operation.register_kernel("cuda")
def _(qkv: Tensor, num_frames: int, heads: int, position: Tensor | None) -> Tensor:
    from kernels.triton.temporal_attention import launch

    _check(qkv, num_frames, heads, position)
    if qkv.element_size() != 2:  # no tensor cores: the tiles spill
        return reference.temporal_attention(qkv, num_frames, heads, position)
    return launch(qkv, num_frames, heads, position)


def _check(qkv: Tensor, num_frames: int, heads: int, position: Tensor | None) -> None:
    if not 1 <= num_frames <= MOST_FRAMES:
        raise ValueError(f"{num_frames} frames are not 1 to {MOST_FRAMES}")
    if qkv.ndim != 3 or qkv.shape[0] % num_frames or qkv.shape[2] % (3 * heads * 8):
        raise ValueError(f"{tuple(qkv.shape)} is not (clips x {num_frames}, positions, 3 x {heads} x a multiple of 8)")
    if position is not None and (position.ndim != 2 or position.shape[0] < num_frames or position.shape[1] != qkv.shape[2]):
        raise ValueError(f"{tuple(position.shape)} has no row of {qkv.shape[2]} for each of {num_frames} frames")
    if position is not None and position.dtype != qkv.dtype:
        raise ValueError(f"{position.dtype} cannot be added to {qkv.dtype}")
