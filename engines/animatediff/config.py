"""Which weights serve AnimateDiff SparseCtrl LCM, and at which shapes. `serve_config.yaml` sets it. Does not import torch."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, Self

from engines.checkpoints.source import Source
from engines.config import ModelConfig

API_FRAMES = 16
"""Frames of a clip in the API; keyframe indices are smaller than this."""


@dataclass(frozen=True)
class AnimateDiffWeights:
    """Where each part is stored (video-models.md, section 1A).

    vae: replaces the base's own. lora_scale: 0.8 is AnimateLCM's model card's.
    """

    base: Source
    motion_adapter: Source
    lora: Source
    sparsectrl_scribble: Source
    sparsectrl_rgb: Source
    vae: Source | None = None
    lora_scale: float = 0.8

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    @classmethod
    def demo(cls, folder: Path) -> "AnimateDiffWeights":
        """The tiny checkpoints that `reelray demo-weights` writes into `folder`."""
        adapter = folder / "AnimateLCM"
        return cls(
            base=Source(folder=folder / "stable-diffusion-v1-5"),
            vae=Source(folder=folder / "sd-vae-ft-mse"),
            motion_adapter=Source(folder=adapter),
            lora=Source(folder=adapter, file="AnimateLCM_sd15_t2v_lora.safetensors"),
            sparsectrl_scribble=Source(folder=folder / "animatediff-sparsectrl-scribble"),
            sparsectrl_rgb=Source(folder=folder / "animatediff-sparsectrl-rgb"),
        )


@dataclass(frozen=True, kw_only=True)
class AnimateDiffConfig(ModelConfig):
    """How the model runs.

    height, width: in pixels; None takes the base checkpoint's own size (512 for SD 1.5). fps: of the file.
    decode_chunk: frames per VAE call, exact for any value; bounds memory (about 0.7 GB a frame at 512x512, fp16).
    control_cache_bytes: limit of the cache of SparseCtrl results, for requests that differ only in their seed (215 MB a step at
    512x512, fp16).
    control_steps: for how many steps SparseCtrl runs in one batch. None is 4 on a GPU and 1 on a CPU: a larger batch overflows a
    CPU's caches, which costs 7 % of a job.
    max_image_pixels: larger keyframes are refused before they are decoded.
    engine: what runs the UNet; if it names no shapes, it is prepared for `num_frames` at `height` and `width`.
    """

    weights: AnimateDiffWeights | Literal["demo"] = "demo"
    num_frames: int = API_FRAMES
    height: int | None = None
    width: int | None = None
    fps: int = 8
    decode_chunk: int = 4
    control_cache_bytes: int = 2_000_000_000
    control_steps: int | None = None
    max_image_pixels: int = 50_000_000

    def placed(self, demo_weights: Path, engines: Path) -> Self:
        """See `ModelConfig`."""
        weights = AnimateDiffWeights.demo(demo_weights) if self.weights == "demo" else self.weights
        return replace(super().placed(demo_weights, engines), weights=weights)

    def __post_init__(self) -> None:
        """Raises `ValueError` for numbers out of range."""
        if self.num_frames < API_FRAMES:
            raise ValueError(f"num_frames is {self.num_frames}, but requests may place keyframes at any of {API_FRAMES} frames")
        counts = (self.fps, self.decode_chunk, self.max_image_pixels, 1 if self.control_steps is None else self.control_steps)
        if min(counts) < 1 or self.control_cache_bytes < 0:
            raise ValueError(
                "fps, decode_chunk, control_steps and max_image_pixels are at least 1, control_cache_bytes at least 0"
            )
