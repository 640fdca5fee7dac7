"""Temporal self-attention on the layout of the video: several positions share a tile, and nothing is permuted.

A pixel's sequence has 14 to 32 frames, but attention kernels work on 64 or more rows: one sequence a tile would waste most of
it. Here a tile holds `ROWS / PADDED` neighbouring positions with all of their frames, and a block-diagonal mask keeps them apart.
The operation is memory-bound, so the scores that the mask removes cost nothing.
"""

from dataclasses import dataclass
from math import log2
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.ahead import Compiled, compiled
from kernels.triton.device import WARPGROUPS, capability
from kernels.triton.head_dim import WIDEST, split

LOG2_E = log2(2.718281828459045)
"""exp(x) = exp2(x log2 e), and exp2 is one instruction."""
MOST_FRAMES = 32
"""AnimateDiff's motion modules have positions for no more, and SVD's windows have 25 at most. More would spill registers."""
LEAST_PADDED = 16
"""Frames are padded to a power of two, at least 16: with less, a tile would read rows of many positions and gain nothing."""


@dataclass(frozen=True)
class Tile:
    """rows: positions times padded frames of a block. warps: of a block."""

    rows: int
    warps: int


def tiles(head_dim: int, capability: int) -> tuple[Tile, ...]:
    """The tiles that do not spill registers. The first is used unless a measurement says otherwise.

    capability: 90 for an H200. At head dimension 160, a tile of 64 rows spills on 80 and 89, and one of 128 rows everywhere.
    A head of two tiles must not be multiplied by warpgroup instructions, which are used from 64 rows and 4 warps on: on an H200
    with Triton 3.6 they gave other values, or an illegal access to shared memory, in most runs (head dimensions 40, 80 and 160;
    2026-11-27). The number of tiles is the same for every head dimension, because a TensorRT plan refers to them by number.
    """
    if capability not in WARPGROUPS:
        return (Tile(32, 4),)
    return (Tile(64, 4), Tile(64, 8)) if split(head_dim)[1] == 0 else (Tile(32, 4), Tile(32, 2))


def tiles_of(qkv: Tensor, num_frames: int, heads: int) -> tuple[Tile, ...]:
    """The tiles for projections (B F, S, 3 C) on their GPU.

    There are none for more than 32 frames, for heads above 160, or if rows do not begin at multiples of 16 bytes.
    """
    head_dim = qkv.shape[2] // 3 // heads
    served = num_frames <= MOST_FRAMES and head_dim <= WIDEST and head_dim % 8 == 0
    return tiles(head_dim, capability(qkv.device)) if served else ()


@triton.jit
def kernel(
    qkv,
    position,
    positions,
    frame_stride,
    token_stride,
    out,
    FRAMES: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    SCALE: tl.constexpr,
):
    """out[f] = sum_g softmax_g(SCALE q[f] k[g]) v[g] for every position and head, with SCALE in units of log 2.

    One block is `ROWS` rows of one head; heads vary fastest, so blocks that share memory sectors run together.
    The output is the last pointer, and other arguments are integers or constants, so that it can become a TensorRT plugin.
    """
    index = tl.program_id(0)
    head = index % HEADS
    tiles = tl.cdiv(positions, ROWS // PADDED)
    clip = index // HEADS // tiles
    rows = tl.arange(0, ROWS)
    frame, place = rows % PADDED, index // HEADS % tiles * (ROWS // PADDED) + rows // PADDED
    real = (frame < FRAMES) & (place < positions)
    image = clip.to(tl.int64) * FRAMES + frame  # (ROWS)
    q = qkv + image * frame_stride + place.to(tl.int64) * token_stride + head * HEAD_DIM
    k, v = q + HEADS * HEAD_DIM, q + 2 * HEADS * HEAD_DIM
    if position is None:
        bias_q, bias_k, bias_v = None, None, None
    else:
        bias_q = position + frame * (3 * HEADS * HEAD_DIM) + head * HEAD_DIM
        bias_k, bias_v = bias_q + HEADS * HEAD_DIM, bias_q + 2 * HEADS * HEAD_DIM
    to = out + (image * positions + place) * (HEADS * HEAD_DIM) + head * HEAD_DIM

    q_first, k_first = _load(q, bias_q, real, 0, FIRST, HEAD_DIM), _load(k, bias_k, real, 0, FIRST, HEAD_DIM)
    scores = tl.dot(q_first, k_first.T, input_precision="ieee")
    if SECOND > 0:
        q_second, k_second = _load(q, bias_q, real, FIRST, SECOND, HEAD_DIM), _load(k, bias_k, real, FIRST, SECOND, HEAD_DIM)
        scores = tl.dot(q_second, k_second.T, scores, input_precision="ieee")
    same = (rows // PADDED)[:, None] == (rows // PADDED)[None, :]
    scores = tl.where(same & (frame < FRAMES)[None, :], scores * SCALE, float("-inf"))  # padded rows attend to their position
    weights = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
    total = tl.sum(weights, axis=1)[:, None]
    weights = weights.to(out.dtype.element_ty)
    v_first = _load(v, bias_v, real, 0, FIRST, HEAD_DIM)
    _store(to, tl.dot(weights, v_first, input_precision="ieee") / total, real, 0, FIRST, HEAD_DIM)
    if SECOND > 0:
        v_second = _load(v, bias_v, real, FIRST, SECOND, HEAD_DIM)
        _store(to, tl.dot(weights, v_second, input_precision="ieee") / total, real, FIRST, SECOND, HEAD_DIM)


@triton.jit
def _load(row, bias, real, START: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Columns from START of the rows at these pointers, plus the table's if there is one; the sum has the rows' dtype."""
    column = START + tl.arange(0, WIDTH)
    mask = real[:, None] & (column < HEAD_DIM)[None, :]
    x = tl.load(row[:, None] + column[None, :], mask=mask, other=0.0)
    if bias is not None:
        x = (x.to(tl.float32) + tl.load(bias[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)).to(x.dtype)
    return x


@triton.jit
def _store(row, x, real, START: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    column = START + tl.arange(0, WIDTH)
    tl.store(row[:, None] + column[None, :], x.to(row.dtype.element_ty), mask=real[:, None] & (column < HEAD_DIM)[None, :])


def padded(frames: int) -> int:
    """Rows of a position in a tile."""
    return max(LEAST_PADDED, 1 << (frames - 1).bit_length())


def constants(frames: int, heads: int, head_dim: int, tile: Tile) -> dict[str, Any]:
    """The kernel's constant arguments, by name."""
    first, second = split(head_dim)
    names = {"FRAMES": frames, "PADDED": padded(frames), "ROWS": tile.rows, "HEADS": heads, "HEAD_DIM": head_dim}
    return names | {"FIRST": first, "SECOND": second, "SCALE": LOG2_E * head_dim**-0.5}


def ahead(frames: int, heads: int, head_dim: int, with_position: bool, dtype: str, capability: int, tile: Tile) -> Compiled:
    """The kernel for another launcher, on contiguous tensors aligned to 16 bytes. dtype: "fp16" or "bf16".

    Its arguments are qkv, position if there is one, positions, frame_stride, token_stride (both in elements) and out.
    """
    pointer, stride = f"*{dtype}:16", "i32" if heads * head_dim % 16 else "i32:16"
    types = {"qkv": pointer, "positions": "i32", "frame_stride": stride, "token_stride": stride, "out": pointer}
    values = constants(frames, heads, head_dim, tile)
    if with_position:
        types["position"] = pointer
    else:
        values["position"] = None
    return compiled(kernel, types, values, capability, num_warps=tile.warps, num_stages=1)


def launch(qkv: Tensor, num_frames: int, heads: int, position: Tensor | None, tile: Tile) -> Tensor:
    """`kernels.temporal_attention.temporal_attention` by the kernel.

    Arguments as there, where they have been checked. tile: one of `tiles_of`.
    """
    images, positions, width = qkv.shape
    head_dim = width // 3 // heads
    if qkv.stride(2) != 1:
        qkv = qkv.contiguous()
    if position is not None:
        position = position.contiguous()
    out = torch.empty(images, positions, width // 3, dtype=qkv.dtype, device=qkv.device)
    named = constants(num_frames, heads, head_dim, tile)
    blocks = images // num_frames * triton.cdiv(positions, tile.rows // padded(num_frames)) * heads
    if blocks:
        arguments = (qkv, position, positions, qkv.stride(0), qkv.stride(1), out)
        with torch.cuda.device_of(qkv):
            kernel[(blocks,)](*arguments, **named, num_warps=tile.warps, num_stages=1)
    return out
