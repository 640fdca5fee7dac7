"""An input to try the model with: three scribbles of a ball that rolls across a table."""

import io
from typing import Any

from PIL import Image, ImageDraw


def demo_input() -> dict[str, Any]:
    """See `registry.demo_input`."""
    job_input: dict[str, Any] = {"prompt": "a ball rolls across the table", "seed": 42}
    for k, (index, x) in enumerate(((0, 60), (8, 256), (15, 452))):
        job_input |= {f"keyframe_{k}_image_url": ("image/png", _ball(x)), f"keyframe_{k}_index": index}
    return job_input


def _ball(x: int) -> bytes:
    """White lines on black: a ball at `x` on a table, 512x512 pixels."""
    image = Image.new("RGB", (512, 512))
    draw = ImageDraw.Draw(image)
    draw.line((0, 400, 512, 400), fill="white", width=6)
    draw.ellipse((x - 60, 280, x + 60, 400), outline="white", width=6)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
