"""Image bytes to tensors. A child process decodes them (`decoder.py`): a file may attack its decoder."""

import torch
from torch import Tensor

from engines.media.decoder import DECODER
from engines.spec import ShouldStop


def load_image(data: bytes, height: int, width: int, max_pixels: int, should_stop: ShouldStop | None = None) -> Tensor:
    """(3, height, width), fp32 in [0, 1]: upright by its EXIF tag, RGB, stretched with Lanczos whatever its aspect.

    Raises `UnsupportedImageFormat`, `ImageTooLarge` (ctx max_height, max_width: of a square at the limit), `ImageLoadError`, and
    `Cancelled` once `should_stop` returns true.
    """
    levels = DECODER.picture("stretched", data, height, width, max_pixels, should_stop=should_stop)
    return torch.from_numpy(levels).permute(2, 0, 1).float() / 255.0


def load_scribble(data: bytes, height: int, width: int, max_pixels: int, should_stop: ShouldStop | None = None) -> Tensor:
    """Like `load_image`, for white lines on black. Strokes on a transparent ground become white on black, whatever their colour.

    A drawing with more than half of its ground filled is shown as it is, with black where it is transparent.
    """
    levels = DECODER.picture("scribble", data, height, width, max_pixels, should_stop=should_stop)
    return torch.from_numpy(levels).permute(2, 0, 1).float() / 255.0


def load_cover(
    data: bytes, height: int, width: int, max_pixels: int, min_side: int = 64, should_stop: ShouldStop | None = None
) -> Tensor:
    """(3, height, width), uint8: upright, RGB, the centre of the image scaled to cover the size, aspect kept.

    Bilinear without antialiasing, the free side rounded up, rounded to 8 bits, then torchvision's centre crop, as in ControlNeXt
    SVD v2's published code. Only the pixels that the crop keeps are computed: an image of one row of a million pixels would
    otherwise cost gigabytes.

    Raises what `load_image` raises, and `ImageTooSmall` (ctx min_height, min_width) below min_side pixels on a side.
    """
    levels = DECODER.picture("cover", data, height, width, max_pixels, min_side=min_side, should_stop=should_stop)
    return torch.from_numpy(levels).permute(2, 0, 1).contiguous()
