"""Attention that does not store the scores, for head dimensions between powers of two, on tokens with heads side by side.

A head of 40, 80 or 160 is two tiles: the scores are the sum of two products, and the output has two accumulators. Queries, keys
and values are read where the projections wrote them, and the output is written where the next projection reads it.
FlashAttention-2, arXiv 2307.08691, algorithm 1.
"""

from dataclasses import dataclass
from math import log2
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.device import WARPGROUPS, capability
from kernels.triton.head_dim import WIDEST, split

LOG2_E = log2(2.718281828459045)
"""exp(x) = exp2(x log2 e), and exp2 is one instruction."""


@dataclass(frozen=True)
class Tile:
    """queries: rows of a block. keys: rows of a step of its loop. warps: of a block. stages: steps whose loads are in flight.

    padded: a head is one tile of the next power of two instead of two tiles, with fewer and larger instructions.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    padded: bool = False


def tiles(head_dim: int, capability: int) -> tuple[Tile, ...]:
    """The tiles that do not spill registers. The first is used unless a measurement says otherwise.

    Each has two stages or more: with one, Triton 3.6 on an H200 gave other values for heads of two tiles (2026-11-27).
    capability: 90 for an H200. At head dimension 160, a step of 64 keys spills on capabilities 80 and 89, and a tile of 128 rows
    with 4 warps spills everywhere.
    """
    if head_dim > 80 and capability not in WARPGROUPS:
        return Tile(64, 32, 4, 2), Tile(64, 32, 4, 3)
    both = Tile(128, 64, 8, 3), Tile(64, 64, 4, 2)
    return (*both, Tile(128, 64, 8, 3, padded=True)) if head_dim == 40 else both  # 8 products of 64 or 11 of 32 and 16


def tiles_of(query: Tensor) -> tuple[Tile, ...]:
    """The tiles for queries (B, N, heads, D) on their GPU; none if D is above 160 or rows are not aligned to 16 bytes."""
    head_dim = query.shape[3]
    return () if head_dim > WIDEST or head_dim % 8 else tiles(head_dim, capability(query.device))


@triton.jit
def kernel(
    query,
    key,
    value,
    queries,
    keys,
    query_batch,
    query_token,
    key_batch,
    key_token,
    value_batch,
    value_token,
    out,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    RAGGED: tl.constexpr,
    SCALE: tl.constexpr,
):
    """out[n] = sum_m softmax_m(SCALE q[n] k[m]) v[m], with SCALE in units of log 2 and the softmax's sum kept while m runs.

    One block is `QUERIES` rows of one head; blocks of one head follow each other, so its keys and values stay in the L2 cache.
    RAGGED: whether `keys` is not a multiple of `KEYS`. The output is the last pointer; other arguments are integers or constants.
    """
    index = tl.program_id(0)
    tiles = tl.cdiv(queries, QUERIES)
    head = index // tiles % HEADS
    batch = (index // tiles // HEADS).to(tl.int64)
    row = index % tiles * QUERIES + tl.arange(0, QUERIES)
    step = tl.arange(0, KEYS)
    real = row < queries
    q = query + batch * query_batch + row.to(tl.int64) * query_token + head * HEAD_DIM
    k = key + batch * key_batch + step.to(tl.int64) * key_token + head * HEAD_DIM
    v = value + batch * value_batch + step.to(tl.int64) * value_token + head * HEAD_DIM
    to = out + ((batch * queries + row) * HEADS + head) * HEAD_DIM

    q_first = _load(q, real, 0, FIRST, HEAD_DIM, True)
    sum_first = tl.zeros((QUERIES, FIRST), tl.float32)
    if SECOND > 0:
        q_second = _load(q, real, FIRST, SECOND, HEAD_DIM, True)
        sum_second = tl.zeros((QUERIES, SECOND), tl.float32)
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    for start in range(0, keys, KEYS):
        there = start + step < keys
        scores = tl.dot(q_first, _load(k, there, 0, FIRST, HEAD_DIM, RAGGED).T, input_precision="ieee")
        if SECOND > 0:
            scores = tl.dot(q_second, _load(k, there, FIRST, SECOND, HEAD_DIM, RAGGED).T, scores, input_precision="ieee")
        if RAGGED:
            scores = tl.where(there[None, :], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1) * SCALE)
        weights = tl.exp2(scores * SCALE - larger[:, None])
        fade = tl.exp2(largest - larger)
        total = total * fade + tl.sum(weights, axis=1)
        weights = weights.to(value.dtype.element_ty)
        v_first = _load(v, there, 0, FIRST, HEAD_DIM, RAGGED)
        sum_first = tl.dot(weights, v_first, sum_first * fade[:, None], input_precision="ieee")
        if SECOND > 0:
            v_second = _load(v, there, FIRST, SECOND, HEAD_DIM, RAGGED)
            sum_second = tl.dot(weights, v_second, sum_second * fade[:, None], input_precision="ieee")
        largest = larger
        k += KEYS * key_token
        v += KEYS * value_token
    _store(to, sum_first / total[:, None], real, 0, FIRST, HEAD_DIM)
    if SECOND > 0:
        _store(to, sum_second / total[:, None], real, FIRST, SECOND, HEAD_DIM)


@triton.jit
def _load(row, real, START: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, RAGGED: tl.constexpr):
    """Columns from START of the rows at these pointers. There is no mask where it would be all true: it would cost registers."""
    column = START + tl.arange(0, WIDTH)
    at = row[:, None] + column[None, :]
    if START + WIDTH > HEAD_DIM:
        if RAGGED:
            return tl.load(at, mask=real[:, None] & (column < HEAD_DIM)[None, :], other=0.0)
        return tl.load(at, mask=(column < HEAD_DIM)[None, :], other=0.0)
    if RAGGED:
        return tl.load(at, mask=real[:, None], other=0.0)
    return tl.load(at)


@triton.jit
def _store(row, x, real, START: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    column = START + tl.arange(0, WIDTH)
    tl.store(row[:, None] + column[None, :], x.to(row.dtype.element_ty), mask=real[:, None] & (column < HEAD_DIM)[None, :])


def constants(heads: int, head_dim: int, keys: int, tile: Tile) -> dict[str, Any]:
    """The kernel's constant arguments, by name."""
    first, second = (triton.next_power_of_2(head_dim), 0) if tile.padded else split(head_dim)
    names = {"HEADS": heads, "HEAD_DIM": head_dim, "FIRST": first, "SECOND": second}
    names |= {"QUERIES": tile.queries, "KEYS": tile.keys, "RAGGED": keys % tile.keys != 0}
    return names | {"SCALE": LOG2_E * head_dim**-0.5}


def launch(query: Tensor, key: Tensor, value: Tensor, tile: Tile) -> Tensor:
    """`kernels.attention.attention` by the kernel. Arguments as there, which has checked them; tile: one of `tiles_of`."""
    batch, queries, heads, head_dim = query.shape
    keys = key.shape[1]
    q, k, v = (x if x.stride(3) == 1 and x.stride(2) == head_dim else x.contiguous() for x in (query, key, value))
    out = torch.empty(batch, queries, heads, head_dim, dtype=query.dtype, device=query.device)
    blocks = batch * heads * triton.cdiv(queries, tile.queries)
    if blocks:
        strides = (stride for x in (q, k, v) for stride in x.stride()[:2])
        named = constants(heads, head_dim, keys, tile)
        with torch.cuda.device_of(query):
            kernel[(blocks,)](q, k, v, queries, keys, *strides, out, **named, num_warps=tile.warps, num_stages=tile.stages)
    return out
