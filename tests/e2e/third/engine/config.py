from dataclasses import dataclass

from engines.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class SolidConfig(ModelConfig):
    """frames: of every clip. denoise_s: how long denoising takes, in seconds."""

    frames: int = 8
    denoise_s: float = 0.0
