"""What a fresh machine needs to try the service without downloads: demo checkpoints, and inputs that contain their files.

The checkpoints are the trained ones of the package. A model that has none there gets random numbers in the same layout.
"""

import base64
import io
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image, ImageDraw

from deployments.schemas.endpoint import ENDPOINTS
from deployments.settings import Settings
from engines.demo.shipped import shipped


def write_missing_weights(settings: Settings) -> None:
    """Writes the demo checkpoints that the settings ask for, unless they are there."""
    for folder, config, write in (
        ("animatediff", settings.animatediff, _write_animatediff),
        ("controlnext", settings.controlnext, _write_controlnext),
    ):
        if config is not None and config.weights == "demo" and not (settings.demo_weights / folder).is_dir():
            write(settings.demo_weights / folder)


def write_demo(folder: Path) -> None:
    """Every model's demo checkpoint below `folder`, and each endpoint's demo input as `<model>.json` with its media beside it."""
    _write_animatediff(folder / "animatediff")
    _write_controlnext(folder / "controlnext")
    for endpoint_id, job_input in demo_inputs().items():
        model = ENDPOINTS[endpoint_id].model
        for field, value in job_input.items():
            if isinstance(value, str) and value.startswith("data:"):
                head, data = value.split(",", 1)
                media = folder / f"{model}-{field.removesuffix('_url')}.{head[5:].split(';')[0].split('/')[1]}"
                media.write_bytes(base64.b64decode(data))
                job_input[field] = media.name  # `reelray submit` and `render` read files beside the input
        (folder / f"{model}.json").write_text(json.dumps(job_input, indent=2) + "\n")


def _write_animatediff(folder: Path) -> None:
    if (trained := shipped("animatediff")) is not None:
        _copy(trained, folder)
    else:
        from engines.animatediff.demo_weights import write_demo_weights

        write_demo_weights(folder)


def _write_controlnext(folder: Path) -> None:
    if (trained := shipped("controlnext")) is not None:
        _copy(trained, folder)
    else:
        from engines.controlnext.demo_weights import write_demo_weights

        write_demo_weights(folder)


def _copy(trained: Path, folder: Path) -> None:
    from engines.demo.checkpoint import write_once

    def copy(draft: Path) -> None:
        shutil.copytree(trained, draft, dirs_exist_ok=True)

    write_once(folder, copy)


def demo_inputs() -> dict[str, dict[str, Any]]:
    """Endpoint id -> input."""
    return {"fal-ai/animatediff-sparsectrl-lcm": _moving_circle(), "fal-ai/controlnext": _dancing_puppet()}


def _moving_circle() -> dict[str, Any]:
    """A sentence of the demo model's grammar, and two scribbles that move the circle's path below the middle."""
    job_input: dict[str, Any] = {"prompt": "a red circle moves right on blue", "seed": 42}
    for k, (index, x) in enumerate(((0, 136), (15, 376))):
        job_input |= {f"keyframe_{k}_image_url": _circle(x, 376), f"keyframe_{k}_index": index}
    return job_input


def _dancing_puppet() -> dict[str, Any]:
    """A small video of two windows, which does not take long on a laptop."""
    from engines.controlnext.demo_pose import puppet_image, write_puppet_clip

    with TemporaryDirectory() as folder:
        clip = Path(folder) / "puppet.mp4"
        write_puppet_clip(clip, frames=30, height=256, width=256, fps=14)
        video = _data_uri("video/mp4", clip.read_bytes())
    return {
        "image_url": _data_uri("image/png", puppet_image(256, 256)),
        "video_url": video,
        "height": 256,
        "width": 256,
        "guidance_scale": 1,
        "num_inference_steps": 4,
        "batch_frames": 8,
        "overlap": 2,
        "seed": 42,
    }


def _data_uri(content_type: str, data: bytes) -> str:
    return f"data:{content_type};base64,{base64.b64encode(data).decode()}"


def _circle(x: int, y: int) -> str:
    """A scribble, white lines on black, of a circle around (x, y); 512x512 pixels, as a data URI."""
    image = Image.new("RGB", (512, 512))
    ImageDraw.Draw(image).ellipse((x - 80, y - 80, x + 80, y + 80), outline="white", width=14)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return _data_uri("image/png", buffer.getvalue())
