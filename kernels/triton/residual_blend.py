"""Residual, bias and blend in one launch: each tensor is read once and the result written once."""

import triton
from torch import Tensor
from triton import language as tl

from kernels.triton.tile import Tile, cdiv

# 64 columns divide every width of both UNets (320 to 2560), so no lane is idle; in fp16 they are a cache line of 128 bytes.
TILES = (Tile(32, 64, 4), Tile(64, 64, 4))


@triton.jit
def blend_rows(h, residual, bias, other, mix, rows, channels, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """y = residual + h + bias; out = y, or mix other + (1 - mix) y.

    h, residual, other, out: (images, rows, channels). bias: (images, channels). mix: (1,) fp32, passed by address, so that
    the layers' 32 values need one kernel and not 32. bias None: no bias. other and mix None: no blend.
    """
    blocks = tl.cdiv(channels, COLUMNS)
    tiles = tl.cdiv(rows, ROWS)
    place = tl.program_id(0) // blocks
    image = place // tiles
    first = place % tiles * ROWS
    columns = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    lanes = tl.arange(0, ROWS)
    inside = (lanes < rows - first)[:, None] & (columns < channels)[None, :]
    base = (image.to(tl.int64) * rows + first) * channels
    spots = lanes[:, None] * channels + columns[None, :]
    y = tl.load(h + base + spots, inside, other=0.0).to(tl.float32)
    y += tl.load(residual + base + spots, inside, other=0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + image * channels + columns, columns < channels, other=0.0).to(tl.float32)[None, :]
    if other is not None:
        share = tl.load(mix)
        y = y + share * (tl.load(other + base + spots, inside, other=0.0).to(tl.float32) - y)
    tl.store(out + base + spots, y.to(out.dtype.element_ty), inside)


def launch(
    h: Tensor, residual: Tensor, bias: Tensor | None, other: Tensor | None, mix: Tensor | None, tile: Tile = TILES[0]
) -> Tensor:
    """Launches the kernel. Shapes as in `kernels.residual_blend.residual_blend`; everything contiguous. tile: how it is cut."""
    assert h.itemsize <= 4, f"{h.dtype} would be computed in fp32"
    for tensor in (h, residual, bias, other):
        assert tensor is None or tensor.is_contiguous(), f"contiguous rows, not strides {tensor.stride()}"
    channels = h.shape[-1]
    images = h.shape[0] if bias is not None and bias.ndim == 2 else 1
    rows = h.numel() // (images * channels)
    out = h.new_empty(h.shape)
    blend_rows[(images * cdiv(rows, tile.rows) * cdiv(channels, tile.columns),)](
        h, residual, bias, other, mix, rows, channels, out, ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps
    )
    return out
