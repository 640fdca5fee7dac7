"""Which weights serve ControlNeXt SVD, and within which limits. `serve_config.yaml` sets it. Does not import torch."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, Self

from engines.checkpoints.source import Source
from engines.config import ModelConfig
from engines.errors import WeightsError

DETECTOR_FILE, POSE_FILE = "yolox_l.onnx", "dw-ll_ucoco_384.onnx"
"""Files of DWPose's two nets, as named in their hub repo."""


@dataclass(frozen=True)
class ControlNeXtWeights:
    """Where each part is stored (video-models.md, section 1B).

    base: Stable Video Diffusion XT; of its UNet only the config is read. unet, control: one .safetensors file each, converted
    from the published pickles by `reelray convert-weights` or obtained in this format. pose: DWPose's two ONNX files.
    """

    base: Source
    unet: Source
    control: Source
    pose: Source

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    @classmethod
    def demo(cls, folder: Path) -> "ControlNeXtWeights":
        """The tiny checkpoints that `reelray demo-weights` writes into `folder`."""
        net = folder / "ControlNeXt-SVD-v2"
        return cls(
            base=Source(folder=folder / "stable-video-diffusion-img2vid-xt-1-1"),
            unet=Source(folder=net, file="unet.safetensors"),
            control=Source(folder=net, file="controlnet.safetensors"),
            pose=Source(folder=folder / "DWPose"),
        )


@dataclass(frozen=True, kw_only=True)
class ControlNeXtConfig(ModelConfig):
    """How the model runs.

    control_batch_frames: frames that go through the control net at once.
    control_cache_bytes: memory for the control net's part that is the same at every step (37 MB a frame at 1024x576, fp16, twice
    that with its residual). For frames that do not fit, it is computed again at every step.
    decode_batch_frames: frames in one VAE call, in whole chunks and at least one; exact for any value; bounds memory (about
    1.3 GB a frame at 1024x576, fp16).
    max_image_pixels: larger images and video frames are refused before they are decoded.
    max_decode_chunk: larger `decode_chunk_size`s are refused: a chunk is decoded at once, whatever decode_batch_frames is.
    max_video_s: longer driving videos are refused.
    engine: what runs the UNet; if it names no shapes, it is prepared for the API's defaults, and TensorRT for 2 to 25 frames at
    that size.
    """

    weights: ControlNeXtWeights | Literal["demo"] = "demo"
    control_batch_frames: int = 8
    control_cache_bytes: int = 2_000_000_000
    decode_batch_frames: int = 8
    max_image_pixels: int = 50_000_000
    max_decode_chunk: int = 32
    max_video_s: float = 3600.0

    def placed(self, demo_weights: Path, engines: Path) -> Self:
        """See `ModelConfig`."""
        weights = ControlNeXtWeights.demo(demo_weights) if self.weights == "demo" else self.weights
        return replace(super().placed(demo_weights, engines), weights=weights)

    def __post_init__(self) -> None:
        """Raises `ValueError` for numbers out of range."""
        counts = (self.control_batch_frames, self.decode_batch_frames, self.max_decode_chunk, self.max_image_pixels)
        if min(counts) < 1 or self.max_video_s <= 0:
            raise ValueError(
                "control_batch_frames, decode_batch_frames, max_decode_chunk and max_image_pixels are at least 1, "
                "max_video_s is above 0"
            )
        if self.control_cache_bytes < 0:
            raise ValueError("control_cache_bytes is at least 0")


def weights_of(config: ControlNeXtConfig) -> ControlNeXtWeights:
    """The configured folders or repos. Raises `WeightsError` for "demo", which the settings must have replaced by its folders."""
    if not isinstance(config.weights, ControlNeXtWeights):
        raise WeightsError('"demo" names no folder; see ControlNeXtWeights.demo')
    return config.weights
