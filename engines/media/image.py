"""Image bytes to tensors, with limits checked before anything is decoded."""

import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from engines.errors import ImageLoadError, ImageTooLarge, UnsupportedImageFormat

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""What is decoded; PIL knows more, but every decoder is a way in."""


def load_image(data: bytes, height: int, width: int, max_pixels: int) -> Tensor:
    """(3, height, width), fp32 in [0, 1]: upright by its EXIF tag, RGB, stretched with Lanczos whatever its aspect.

    Raises `UnsupportedImageFormat`, `ImageTooLarge` (ctx max_height, max_width: of a square at the limit) and `ImageLoadError`.
    """
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            warnings.simplefilter("ignore")  # PIL's own guess at a bomb; ours follows
            if image.width * image.height > max_pixels:
                raise _too_large(max_pixels)
            picture = _rgb(ImageOps.exif_transpose(image)).resize((width, height), Image.Resampling.LANCZOS)
    except UnidentifiedImageError as exc:
        raise UnsupportedImageFormat(
            f"The file is not an image in one of the formats {', '.join(FORMATS)}.", (), {"supported_formats": list(FORMATS)}
        ) from exc
    except Image.DecompressionBombError as exc:  # raised by PIL before its size can be read
        raise _too_large(max_pixels) from exc
    except (OSError, ValueError, SyntaxError, EOFError) as exc:  # what PIL's decoders raise
        raise ImageLoadError("The image is damaged and could not be decoded.") from exc
    pixels = torch.from_numpy(np.array(picture))  # (height, width, 3) uint8
    return pixels.permute(2, 0, 1).float() / 255.0


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB. PIL clips what has more than 8 bits instead of scaling it; floating point says no range at all."""
    if image.mode == "F":
        raise UnsupportedImageFormat("Floating-point images are not served.")
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64).clip(0, 65535) // 257
        image = Image.fromarray(levels.astype(np.uint8))
    return image.convert("RGB")


def _too_large(max_pixels: int) -> ImageTooLarge:
    side = int(max_pixels**0.5)
    return ImageTooLarge(f"The image has more than {max_pixels} pixels.", (), {"max_height": side, "max_width": side})
