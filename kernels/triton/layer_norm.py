"""LayerNorm and the position table after it in one launch: a row stays in registers between its statistics and its result."""

import triton
from torch import Tensor
from triton import language as tl

from kernels.triton.tile import Tile, cdiv, next_power_of_2

# A row's columns are rounded up to a power of two: at 320, 640 and 1280 three of eight lanes idle, but nothing is read for them.
VALUES = (Tile(1, 4096, 4), Tile(1, 2048, 4))
"""How many values a program holds (rows x columns); the number of rows follows from the width."""


@triton.jit
def layer_norm_rows(
    x, weight, bias, positions, rows, channels, inner, length, out, EPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """out = (x - mean) / sqrt(var + eps) weight + bias + positions[row // inner % length], var about the mean.

    x, out: (rows, channels). weight, bias: (channels,). positions: (at least length, channels), or None.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    held = columns < channels
    inside = (row < rows)[:, None] & held[None, :]
    spots = row.to(tl.int64)[:, None] * channels + columns[None, :]
    value = tl.load(x + spots, inside, other=0.0).to(tl.float32)
    mean = tl.sum(value, 1) / channels
    gap = tl.where(inside, value - mean[:, None], 0.0)
    factor = 1.0 / tl.sqrt(tl.sum(gap * gap, 1) / channels + EPS)
    y = gap * factor[:, None] * tl.load(weight + columns, held, other=0.0).to(tl.float32)[None, :]
    y += tl.load(bias + columns, held, other=0.0).to(tl.float32)[None, :]
    if positions is not None:
        place = row // inner % length
        y += tl.load(positions + place[:, None] * channels + columns[None, :], inside, other=0.0).to(tl.float32)
    tl.store(out + spots, y.to(out.dtype.element_ty), inside)


def launch(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, positions: Tensor | None, axis: int, tile: Tile = VALUES[0]
) -> Tensor:
    """Launches the kernel. Shapes as in `kernels.layer_norm.layer_norm`; everything contiguous. tile: how the work is cut."""
    assert x.itemsize <= 4, f"{x.dtype} would be computed in fp32"
    for tensor in (x, weight, bias, positions):
        assert tensor is None or tensor.is_contiguous(), f"contiguous rows, not strides {tensor.stride()}"
    channels = x.shape[-1]
    rows = x.numel() // channels
    cut = cut_rows(tile, channels)
    out = x.new_empty(x.shape)
    layer_norm_rows[(cdiv(rows, cut.rows),)](
        x, weight, bias, positions, rows, channels, x.shape[axis + 1 : -1].numel(), x.shape[axis], out,
        EPS=eps, ROWS=cut.rows, COLUMNS=cut.columns, num_warps=cut.warps,
    )  # fmt: skip
    return out


def cut_rows(tile: Tile, channels: int) -> Tile:
    """The tile cut into rows of that many channels."""
    columns = next_power_of_2(channels)
    return tile._replace(rows=max(1, tile.columns // columns), columns=columns)
