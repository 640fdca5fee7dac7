"""Keyframes drawn by the tests."""

import io

from PIL import Image, ImageDraw

from engines.animatediff.spec import Keyframe


def scribble(k: int = 0, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """White lines on black; each k gives a different drawing."""
    image = Image.new("RGB", size)
    ImageDraw.Draw(image).ellipse((10 + 9 * k, 8, 50 + 9 * k, 60), outline="white", fill=(40 * k, 90, 200), width=3)
    return image


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def keyframes(*indices: int) -> tuple[Keyframe, ...]:
    return tuple(Keyframe(index, png(scribble(k)), f"keyframe_{k}_image_url") for k, index in enumerate(indices))
