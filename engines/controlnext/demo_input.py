"""An input to try the model with: a small video of three windows, at the size that the demo model draws."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from engines.controlnext.demo_pose import puppet_image, write_puppet_clip


def demo_input() -> dict[str, Any]:
    """See `registry.demo_input`."""
    with TemporaryDirectory() as folder:
        clip = Path(folder) / "puppet.mp4"
        write_puppet_clip(clip, frames=30, height=256, width=256, fps=14)
        video = clip.read_bytes()
    return {
        "image_url": ("image/png", puppet_image(256, 256)),
        "video_url": ("video/mp4", video),
        "height": 256,
        "width": 256,
        "guidance_scale": 1,
        "num_inference_steps": 4,
        "batch_frames": 8,
        "overlap": 2,
        "seed": 42,
    }
