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
                side = int(max_pixels**0.5)
                raise ImageTooLarge(
                    f"The image has {image.width}x{image.height} pixels; at most {max_pixels} are served.",
                    (),
                    {"max_height": side, "max_width": side},
                )
            picture = ImageOps.exif_transpose(image).convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    except UnidentifiedImageError as exc:
        raise UnsupportedImageFormat(
            f"The file is not an image in one of the formats {', '.join(FORMATS)}.", (), {"supported_formats": list(FORMATS)}
        ) from exc
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as exc:  # what PIL's decoders raise
        raise ImageLoadError("The image is damaged and could not be decoded.") from exc
    pixels = torch.from_numpy(np.array(picture))  # (height, width, 3) uint8
    return pixels.permute(2, 0, 1).float() / 255.0
