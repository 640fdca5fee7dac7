from dataclasses import dataclass

from engines.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class SolidConfig(ModelConfig):
    """frames: of every clip."""

    frames: int = 8
