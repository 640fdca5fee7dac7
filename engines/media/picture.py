"""Image bytes to pixels of 8 bits, with limits checked before anything is decoded. Runs in the child process, without torch.

Colours that a colour profile describes are converted to sRGB. What transparency hides is never shown to a model: there is an
arbitrary colour under it. Metadata that cannot be read says nothing; it costs no picture.
"""

import io
import struct
import warnings
from math import ceil
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from engines.errors import ImageLoadError, ImageTooLarge, ImageTooSmall, UnsupportedImageFormat
from engines.media.bare_image import without_metadata

Pixels: TypeAlias = NDArray[np.uint8]
"""(height, width, 3), RGB."""

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""The formats that are decoded. PIL knows more, but every decoder adds to the attack surface."""

BACKGROUND = (128, 128, 128)
"""Neutral grey, shown where a picture is transparent."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns a picture upright, by its EXIF orientation."""

_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF 6.0
_WHITE_IS_ZERO, _SIGNED = 0, 2


def stretched(data: bytes, height: int, width: int, max_pixels: int) -> Pixels:
    """See `image.load_image`, whose levels these are."""
    return _resized(_picture(data, max_pixels), height, width)


def scribble(data: bytes, height: int, width: int, max_pixels: int) -> Pixels:
    """See `image.load_scribble`, whose levels these are."""
    colours, alpha = _decoded(data, max_pixels)
    if alpha is not None:
        if np.asarray(alpha).mean() < 127.5:
            colours = alpha.convert("RGB")
        else:
            colours = Image.composite(colours, Image.new("RGB", colours.size), alpha)
    return _resized(colours, height, width)


def cover(data: bytes, height: int, width: int, max_pixels: int, min_side: int) -> Pixels:
    """See `image.load_cover`."""
    picture = _picture(data, max_pixels)
    if min(picture.size) < min_side:
        limits = {"min_height": min_side, "min_width": min_side}
        raise ImageTooSmall(f"The image has fewer than {min_side} pixels on a side.", (), limits)
    pixels = np.asarray(picture)
    scaled_height, scaled_width = height, width
    ratio = picture.height / picture.width  # a float, whose rounding moves the published code's ceiling for some sizes
    if ratio < height / width:
        scaled_width = ceil(height / ratio)
    else:
        scaled_height = ceil(width * ratio)
    up, down, row_share = _taps(picture.height, scaled_height, height)
    left, right, column_share = _taps(picture.width, scaled_width, width)
    columns, rows = column_share[:, None], row_share[:, None, None]
    upper = _mixed(_at(pixels, up, left), _at(pixels, up, right), columns)
    lower = _mixed(_at(pixels, down, left), _at(pixels, down, right), columns)
    return _mixed(upper, lower, rows).round().astype(np.uint8)


def _taps(size: int, scaled: int, kept: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """For the middle `kept` of `scaled` pixels made from `size`: the two source pixels of each, (kept,), and the second's share.

    As in torch's `interpolate(mode="bilinear", align_corners=False)`, pixel i is sampled at (i + 1/2) size / scaled - 1/2. In
    fp32, as there: with a position more exact one pixel in a hundred of a large image would be rounded to another level.
    """
    start = round((scaled - kept) / 2)  # rounds halves to even, as torchvision does
    scale, half = np.float32(size) / np.float32(scaled), np.float32(0.5)
    position = np.maximum(scale * (np.arange(start, start + kept, dtype=np.float32) + half) - half, np.float32(0))
    first = np.minimum(np.floor(position).astype(np.int64), size - 1)
    share = (position - first.astype(np.float32)).clip(0, 1)
    return first, np.minimum(first + 1, size - 1), share


def _at(pixels: Pixels, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float32]:
    return pixels[rows[:, None], columns].astype(np.float32)  # (rows, columns, 3)


def _mixed(one: NDArray[np.float32], other: NDArray[np.float32], share: NDArray[np.float32]) -> NDArray[np.float32]:
    return one * (1 - share) + other * share


def _resized(picture: Image.Image, height: int, width: int) -> Pixels:
    return np.array(picture.resize((width, height), Image.Resampling.LANCZOS))


def _picture(data: bytes, max_pixels: int) -> Image.Image:
    """Upright, RGB, over `BACKGROUND`."""
    colours, alpha = _decoded(data, max_pixels)
    return colours if alpha is None else Image.composite(colours, Image.new("RGB", colours.size, BACKGROUND), alpha)


def _decoded(data: bytes, max_pixels: int) -> tuple[Image.Image, Image.Image | None]:
    """Upright: 8-bit sRGB, and how opaque it is (L), None if it is so everywhere."""
    try:
        return _opened(data, max_pixels)
    except (ImageLoadError, UnsupportedImageFormat):
        bare = without_metadata(data)
        if bare is None:
            raise
    return _opened(bare, max_pixels)


def _opened(data: bytes, max_pixels: int) -> tuple[Image.Image, Image.Image | None]:
    try:
        # PIL's own warnings are of large images, whose check follows, and of odd metadata
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise _too_large(max_pixels)
            image.load()
            return _separated(_upright(image, _of_8_bits(image)), image.info.get("icc_profile"))
    except UnidentifiedImageError as exc:
        raise UnsupportedImageFormat(
            f"The file is not an image in one of the formats {', '.join(FORMATS)}.", (), {"supported_formats": list(FORMATS)}
        ) from exc
    except Image.DecompressionBombError as exc:  # raised by PIL before its size can be read
        raise _too_large(max_pixels) from exc
    except (OSError, ValueError, SyntaxError, EOFError, TypeError, struct.error) as exc:  # what PIL's decoders raise
        raise ImageLoadError("The image is damaged and could not be decoded.") from exc


def _upright(image: Image.Image, pixels: Image.Image) -> Image.Image:
    """The pixels of the image, turned by its tag. `ImageOps.exif_transpose` fails where it cannot write the other tags again."""
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # PIL's parser raises nearly anything
        return pixels
    return pixels if turn is None else pixels.transpose(turn)


def _of_8_bits(image: Image.Image) -> Image.Image:
    """The image with at most 8 bits a value. PIL would clip larger values; floating-point images state no range."""
    if image.mode == "F":
        raise UnsupportedImageFormat("Floating-point images are not served.")
    return Image.fromarray(_levels(image)) if image.mode.startswith("I") else image


def _levels(image: Image.Image) -> NDArray[np.uint8]:
    """Grey of more than 8 bits. A TIFF says how many; in 32 bits most programs leave values of 8 or 16, so the values decide."""
    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image).astype(np.int64)
    bits, signed = tags.get(_BITS, (16,))[0], tags.get(_SAMPLE_FORMAT, (1,))[0] == _SIGNED
    if signed:
        values, bits = values.clip(min=0), bits - 1
    else:
        values &= (1 << bits) - 1  # PIL's 32 bits are signed
    if bits > 16:
        bits = next(depth for depth in (8, 16, bits) if values.max() < 1 << depth)
    levels = np.round(values * (255 / ((1 << bits) - 1))).astype(np.uint8)
    return 255 - levels if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else levels


def _separated(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, Image.Image | None]:
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        if np.asarray(alpha).min() == 255:
            alpha = None
    if image.mode not in ("L", "RGB", "CMYK"):  # the modes that a profile may be of
        image = image.convert("RGB")
    return (_in_srgb(image, profile) if profile else _in_rgb(image)), alpha


def _in_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" not in ImageCms.getProfileDescription(source).lower():  # else rounding would change some levels by one
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            assert converted is not None
            return converted
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):  # a malformed profile, or one of another kind of image
        pass
    return _in_rgb(image)


def _in_rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def _too_large(max_pixels: int) -> ImageTooLarge:
    side = int(max_pixels**0.5)
    return ImageTooLarge(f"The image has more than {max_pixels} pixels.", (), {"max_height": side, "max_width": side})
