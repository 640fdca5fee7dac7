"""GroupNorm and SiLU over rows of channels, in three launches: moments by chunk, an affine map by channel, its application.

The input is read twice, and the output written once; between the launches 8 bytes are passed for each channel and chunk. There
are no atomics: each sum has one order, fixed by the shape, so the same input gives the same bits.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from kernels.triton.tile import Tile, cdiv, next_power_of_2

# 64 columns divide every width of both UNets (320 to 2560), so no lane is idle; in fp16 they are a cache line of 128 bytes.
MOMENTS = (Tile(32, 64, 4, repeats=16), Tile(32, 64, 4, repeats=4))
"""A chunk has rows x repeats rows. With 512, partial results are 1/128 of fp16 input, and SVD's top level is 2160 programs."""
APPLY = (Tile(64, 64, 4), Tile(32, 64, 4))
CUTS = tuple((moments, apply) for moments in MOMENTS for apply in APPLY)
"""All pairs of the two."""
PARTIALS = 1024
"""Partial results that `channel_affine` holds at a time: 8 a thread. 4096 took 255 registers."""


@triton.jit
def chunk_moments(x, rows, channels, chunks, means, squares, ROWS: tl.constexpr, COLUMNS: tl.constexpr, REPEATS: tl.constexpr):
    """Mean of each channel over a chunk of rows, and the sum of squared differences from it.

    Welford's recurrence down the rows of each lane, Chan's formula across lanes (Chan, Golub, LeVeque 1983, eq. 2.1): a sum of
    squares minus the square of a sum would lose the variance if the mean is large.
    x: (clips, rows, channels). means, squares: (clips, chunks, channels), fp32.
    """
    blocks = tl.cdiv(channels, COLUMNS)
    place = tl.program_id(0) // blocks  # clip x chunks + chunk; columns vary fastest, so that neighbours share pages
    columns = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    first = place % chunks * (ROWS * REPEATS)
    x += ((place // chunks).to(tl.int64) * rows + first) * channels  # a clip in the VAE has more than 2**31 values
    lanes = tl.arange(0, ROWS)
    mean = tl.zeros([ROWS, COLUMNS], tl.float32)
    square = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in range(REPEATS):
        row = lanes + i * ROWS
        inside = (row < rows - first)[:, None] & (columns < channels)[None, :]
        value = tl.load(x + row[:, None] * channels + columns[None, :], inside, other=0.0).to(tl.float32)
        delta = tl.where(inside, value - mean, 0.0)
        mean += delta * (1.0 / (i + 1))
        square += delta * (value - mean)
    held = tl.minimum(rows - first, ROWS * REPEATS)
    seen = tl.minimum(tl.maximum((held - lanes + ROWS - 1) // ROWS, 0), REPEATS).to(tl.float32)[:, None]  # rows of each lane
    whole = tl.sum(mean * seen, 0) / held
    gap = mean - whole[None, :]
    place = place.to(tl.int64) * channels + columns
    tl.store(means + place, whole, columns < channels)
    tl.store(squares + place, tl.sum(square + seen * gap * gap, 0), columns < channels)


@triton.jit
def channel_affine(
    means, squares, weight, bias, added, rows, channels, chunks, groups, scale, shift,
    EPS: tl.constexpr, CHUNK_ROWS: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """GroupNorm as one multiplication and one addition: scale = weight / sqrt(var + eps), shift = bias + (added - mean) scale.

    Adding a constant to every value of a channel shifts the channel's means, but not the differences from them.

    Chan's formula over the chunks and channels of a group: var = sum_i (squares_i + n_i (means_i - mean)^2) / sum_i n_i.
    means, squares: (clips, chunks, channels). weight, bias, added: (channels,), the last may be None. scale, shift: (clips,
    channels), fp32.
    """
    clip = tl.program_id(0) // groups
    width = channels // groups
    lanes = tl.arange(0, WIDTH)
    channel = tl.program_id(0) % groups * width + lanes
    base = clip.to(tl.int64) * chunks * channels
    means += base
    squares += base
    total = rows * width * 1.0
    moved = tl.zeros([WIDTH], tl.float32)
    if added is not None:
        moved = tl.load(added + channel, lanes < width, other=0.0).to(tl.float32)
    acc = tl.zeros([CHUNKS, WIDTH], tl.float32)
    for start in range(0, chunks, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        inside = (chunk < chunks)[:, None] & (lanes < width)[None, :]
        held = tl.minimum(rows - chunk * CHUNK_ROWS, CHUNK_ROWS).to(tl.float32)[:, None]
        seen = tl.load(means + chunk[:, None] * channels + channel[None, :], inside, other=0.0)
        acc += tl.where(inside, held * (seen + moved[None, :]), 0.0)
    mean = tl.sum(tl.sum(acc, 1), 0) / total
    acc = tl.zeros([CHUNKS, WIDTH], tl.float32)
    for start in range(0, chunks, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        inside = (chunk < chunks)[:, None] & (lanes < width)[None, :]
        held = tl.minimum(rows - chunk * CHUNK_ROWS, CHUNK_ROWS).to(tl.float32)[:, None]
        place = chunk[:, None] * channels + channel[None, :]
        gap = tl.load(means + place, inside, other=0.0) + moved[None, :] - mean
        acc += tl.where(inside, tl.load(squares + place, inside, other=0.0) + held * gap * gap, 0.0)
    factor = 1.0 / tl.sqrt(tl.sum(tl.sum(acc, 1), 0) / total + EPS)
    factor = factor * tl.load(weight + channel, lanes < width, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, lanes < width, other=0.0).to(tl.float32) + (moved - mean) * factor
    tl.store(scale + clip * channels + channel, factor, lanes < width)
    tl.store(shift + clip * channels + channel, offset, lanes < width)


@triton.jit
def apply_affine(x, scale, shift, rows, channels, out, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """y = x scale + shift, then y sigmoid(y) if SILU.

    x, out: (clips, rows, channels). scale, shift: (clips, channels), fp32.
    """
    blocks = tl.cdiv(channels, COLUMNS)
    tiles = tl.cdiv(rows, ROWS)
    place = tl.program_id(0) // blocks
    clip = place // tiles
    first = place % tiles * ROWS
    columns = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    lanes = tl.arange(0, ROWS)
    base = (clip.to(tl.int64) * rows + first) * channels
    spots = lanes[:, None] * channels + columns[None, :]
    inside = (lanes < rows - first)[:, None] & (columns < channels)[None, :]
    factor = tl.load(scale + clip * channels + columns, columns < channels, other=0.0)
    offset = tl.load(shift + clip * channels + columns, columns < channels, other=0.0)
    y = tl.load(x + base + spots, inside, other=0.0).to(tl.float32) * factor[None, :] + offset[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(out + base + spots, y.to(out.dtype.element_ty), inside)


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    num_frames: int,
    silu: bool,
    moments: Tile = MOMENTS[0],
    apply: Tile = APPLY[0],
    added: Tensor | None = None,
) -> Tensor:
    """Launches the kernels. Shapes as in `kernels.group_norm_silu.group_norm_silu`; x in channels-last memory.

    moments, apply: how the work is cut into programs.
    """
    assert x.itemsize <= 4, f"{x.dtype} would be computed in fp32"
    assert x.is_contiguous(memory_format=torch.channels_last), f"channels-last images, not strides {x.stride()}"
    assert weight.is_contiguous()
    assert bias.is_contiguous()
    assert added is None or added.is_contiguous()
    channels, clips = x.shape[1], x.shape[0] // num_frames
    rows = num_frames * x.shape[2] * x.shape[3]
    chunk_rows = moments.rows * moments.repeats
    chunks, group_width = cdiv(rows, chunk_rows), next_power_of_2(channels // groups)
    means, squares = x.new_empty(2, clips, chunks, channels, dtype=torch.float32)
    scale, shift = x.new_empty(2, clips, channels, dtype=torch.float32)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    chunk_moments[(clips * chunks * cdiv(channels, moments.columns),)](
        x, rows, channels, chunks, means, squares,
        ROWS=moments.rows, COLUMNS=moments.columns, REPEATS=moments.repeats, num_warps=moments.warps,
    )  # fmt: skip
    channel_affine[(clips * groups,)](
        means, squares, weight, bias, added, rows, channels, chunks, groups, scale, shift,
        EPS=eps, CHUNK_ROWS=chunk_rows, CHUNKS=max(1, PARTIALS // group_width), WIDTH=group_width, num_warps=4,
    )  # fmt: skip
    apply_affine[(clips * cdiv(rows, apply.rows) * cdiv(channels, apply.columns),)](
        x, scale, shift, rows, channels, out,
        SILU=silu, ROWS=apply.rows, COLUMNS=apply.columns, num_warps=apply.warps,
    )  # fmt: skip
    return out
