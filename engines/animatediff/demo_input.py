"""An input to try the model with: a sentence of the demo model's grammar, and two scribbles that move the circle's path."""

import io
from typing import Any

from PIL import Image, ImageDraw


def demo_input() -> dict[str, Any]:
    """See `registry.demo_input`."""
    job_input: dict[str, Any] = {"prompt": "a red circle moves right on blue", "seed": 42}
    for k, (index, x) in enumerate(((0, 136), (15, 376))):
        job_input |= {f"keyframe_{k}_image_url": ("image/png", _circle(x, 376)), f"keyframe_{k}_index": index}
    return job_input


def _circle(x: int, y: int) -> bytes:
    """White lines on black: a circle around (x, y), 512x512 pixels."""
    image = Image.new("RGB", (512, 512))
    ImageDraw.Draw(image).ellipse((x - 80, y - 80, x + 80, y + 80), outline="white", width=14)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
