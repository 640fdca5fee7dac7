"""What the configs of all models have in common. No torch."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Self

from engines.backends.config import EngineConfig
from engines.checkpoints.source import DType


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """How a model runs; models add what they need, and `weights` if they have any.

    threads: torch's CPU threads in a process; None is all cores on a CPU and one beside a GPU. engine: what runs the UNet.
    memory_bytes: GPU memory that one replica of a stage may use: the card's, or the share that the stages' `num_gpus` give it.
    Requests whose estimated peak is larger are refused when they are submitted, see `engines.demand`. None accepts all.
    """

    device: str = "cpu"
    dtype: DType = "float32"
    threads: int | None = None
    memory_bytes: int | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    @property
    def on_gpu(self) -> bool:
        """Whether its nets run on a GPU."""
        return self.device.startswith("cuda")

    def placed(self, demo_weights: Path, engines: Path) -> Self:
        """The config with folders where it has none yet: of the demo checkpoint, if it asks for that, and of the engines."""
        return self if self.engine.folder is not None else replace(self, engine=replace(self.engine, folder=engines))
