"""Image bytes to tensors, with limits checked before anything is decoded."""

import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from engines.errors import ImageLoadError, ImageTooLarge, ImageTooSmall, UnsupportedImageFormat

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""The formats that are decoded. PIL knows more, but every decoder adds to the attack surface."""


def load_image(data: bytes, height: int, width: int, max_pixels: int) -> Tensor:
    """(3, height, width), fp32 in [0, 1]: upright by its EXIF tag, RGB, stretched with Lanczos whatever its aspect.

    Raises `UnsupportedImageFormat`, `ImageTooLarge` (ctx max_height, max_width: of a square at the limit) and `ImageLoadError`.
    """
    picture = _decode(data, max_pixels).resize((width, height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(picture))  # (height, width, 3) uint8
    return pixels.permute(2, 0, 1).float() / 255.0


def load_cover(data: bytes, height: int, width: int, max_pixels: int, min_side: int = 64) -> Tensor:
    """(3, height, width), fp32 in [0, 1]: upright, RGB, the centre of the image scaled to cover the size, aspect kept.

    Bilinear without antialiasing, the free side rounded up, then torchvision's centre crop, as in ControlNeXt SVD v2's
    published code. That code rounds to 8 bits after scaling, this does not (at most half a level apart). Only the pixels that
    the crop keeps are computed: an image of one row of a million pixels would otherwise cost gigabytes.

    Raises what `load_image` raises, and `ImageTooSmall` (ctx min_height, min_width) below min_side pixels on a side.
    """
    picture = _decode(data, max_pixels)
    if min(picture.size) < min_side:
        limits = {"min_height": min_side, "min_width": min_side}
        raise ImageTooSmall(f"The image has fewer than {min_side} pixels on a side.", (), limits)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)  # (3, picture.height, picture.width) uint8
    scaled_height = max(height, _ceil_div(picture.height * width, picture.width))
    scaled_width = max(width, _ceil_div(picture.width * height, picture.height))
    up, down, row_share = _taps(picture.height, scaled_height, height)
    left, right, column_share = _taps(picture.width, scaled_width, width)
    upper = torch.lerp(_at(pixels, up, left), _at(pixels, up, right), column_share)
    lower = torch.lerp(_at(pixels, down, left), _at(pixels, down, right), column_share)
    return torch.lerp(upper, lower, row_share[:, None])


def _taps(size: int, scaled: int, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """For the middle `kept` of `scaled` pixels made from `size`: the two source pixels of each, (kept,), and the second's share.

    As in torch's `interpolate(mode="bilinear", align_corners=False)`, pixel i is sampled at (i + 1/2) size / scaled - 1/2.
    """
    start = round((scaled - kept) / 2)  # rounds halves to even, as torchvision does
    position = ((torch.arange(start, start + kept, dtype=torch.float64) + 0.5) * (size / scaled) - 0.5).clamp(min=0)
    first = position.floor().long()
    return first, (first + 1).clamp(max=size - 1), (position - first).float()


def _at(pixels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return pixels[:, rows[:, None], columns].float() / 255.0  # (3, rows, columns)


def _ceil_div(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


def _decode(data: bytes, max_pixels: int) -> Image.Image:
    """Upright by its EXIF tag, 8-bit RGB."""
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            warnings.simplefilter("ignore")  # PIL's own warning of large images; our check follows
            if image.width * image.height > max_pixels:
                raise _too_large(max_pixels)
            return _rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as exc:
        raise UnsupportedImageFormat(
            f"The file is not an image in one of the formats {', '.join(FORMATS)}.", (), {"supported_formats": list(FORMATS)}
        ) from exc
    except Image.DecompressionBombError as exc:  # raised by PIL before its size can be read
        raise _too_large(max_pixels) from exc
    except (OSError, ValueError, SyntaxError, EOFError) as exc:  # what PIL's decoders raise
        raise ImageLoadError("The image is damaged and could not be decoded.") from exc


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB. PIL would clip values of more than 8 bits, so they are scaled here; floating-point images state no range."""
    if image.mode == "F":
        raise UnsupportedImageFormat("Floating-point images are not served.")
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64).clip(0, 65535) // 257
        image = Image.fromarray(levels.astype(np.uint8))
    return image.convert("RGB")


def _too_large(max_pixels: int) -> ImageTooLarge:
    side = int(max_pixels**0.5)
    return ImageTooLarge(f"The image has more than {max_pixels} pixels.", (), {"max_height": side, "max_width": side})
