"""What stands in for the world on a fresh machine: demo checkpoints, and inputs that need no file from anywhere."""

import base64
import io
from typing import Any

from PIL import Image, ImageDraw

from deployments.settings import Settings


def write_missing_weights(settings: Settings) -> None:
    """Writes the demo checkpoints if the settings ask for them and they are not there."""
    if settings.animatediff is not None and settings.animatediff.weights == "demo" and not settings.demo_weights.is_dir():
        from engines.animatediff.demo_weights import write_demo_weights

        write_demo_weights(settings.demo_weights)


def demo_inputs() -> dict[str, dict[str, Any]]:
    """Endpoint id -> input."""
    animatediff = {"prompt": "a ball rolls across the table", "seed": 42}
    for k, (index, x) in enumerate(((0, 60), (8, 256), (15, 452))):
        animatediff |= {f"keyframe_{k}_image_url": _ball(x), f"keyframe_{k}_index": index}
    return {"fal-ai/animatediff-sparsectrl-lcm": animatediff}


def _ball(x: int) -> str:
    """A scribble, white lines on black, of a ball at `x` on a table; 512x512 pixels, as a data URI."""
    image = Image.new("RGB", (512, 512))
    draw = ImageDraw.Draw(image)
    draw.line((0, 400, 512, 400), fill="white", width=6)
    draw.ellipse((x - 60, 280, x + 60, 400), outline="white", width=6)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
