"""Where a checkpoint lies; `engines.weights` reads it. No torch, so that settings can name it."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

DType = Literal["float32", "float16", "bfloat16", "float64"]
"""How weights and activations are held."""


@dataclass(frozen=True)
class Source:
    """A checkpoint: a local `folder`, or a hub `repo` at a `revision`.

    file: one file in it, where it holds several (a LoRA). variant: "fp16" reads `name.fp16.safetensors`.
    """

    folder: Path | None = None
    repo: str | None = None
    revision: str | None = None
    file: str | None = None
    variant: str | None = None

    __pydantic_config__: ClassVar = {"extra": "forbid"}
