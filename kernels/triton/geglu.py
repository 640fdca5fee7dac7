"""GEGLU's product in one launch: each value of the projection is read once, each value of the result written once."""

import triton
from torch import Tensor
from triton import language as tl

from kernels.triton.tile import Tile, cdiv

# Feed-forward widths are 4 C = 1280, 2560 and 5120, all multiples of 256: no lane is idle.
TILES = (Tile(8, 256, 4), Tile(4, 256, 4))


@triton.jit
def geglu_rows(x, rows, width, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out = a g (1 + erf(g / sqrt 2)) / 2. The exact gelu, which the models were trained with, not the one with tanh.

    A value takes 40 instructions, most of them for erf (sm_90): 0.87 of what an H200 can issue while its memory moves 6 bytes.
    x: (rows, 2 width), a, then g. out: (rows, width).
    """
    blocks = tl.cdiv(width, COLUMNS)
    first = tl.program_id(0) // blocks * ROWS
    columns = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    lanes = tl.arange(0, ROWS)
    inside = (lanes < rows - first)[:, None] & (columns < width)[None, :]
    base = first.to(tl.int64) * width  # int64: SVD's top level has half of 2**31 values for two clips
    spots = lanes[:, None] * width + columns[None, :]
    gates = 2 * base + 2 * lanes[:, None] * width + columns[None, :]
    a = tl.load(x + gates, inside, other=0.0).to(tl.float32)
    g = tl.load(x + gates + width, inside, other=0.0).to(tl.float32)
    y = a * g * 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
    tl.store(out + base + spots, y.to(out.dtype.element_ty), inside)


def launch(x: Tensor, tile: Tile = TILES[0]) -> Tensor:
    """Launches the kernel. Shapes as in `kernels.geglu.geglu`; x contiguous. tile: how the work is cut into programs."""
    assert x.itemsize <= 4, f"{x.dtype} would be computed in fp32"
    assert x.is_contiguous(), f"contiguous rows, not strides {x.stride()}"
    width = x.shape[-1] // 2
    rows = x.numel() // (2 * width)
    out = x.new_empty(*x.shape[:-1], width)
    geglu_rows[(cdiv(rows, tile.rows) * cdiv(width, tile.columns),)](
        x, rows, width, out, ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps
    )
    return out
