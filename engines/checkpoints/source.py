"""Where a checkpoint is stored; `engines.checkpoints.weights` reads it. Does not import torch, so that settings can use it."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

DType = Literal["float32", "float16", "bfloat16", "float64"]
"""The dtype of weights and activations."""


@dataclass(frozen=True)
class Source:
    """A checkpoint: a local `folder`, or a hub `repo` at a `revision`.

    file: one file in it, if it holds several (a LoRA). variant: "fp16" reads `name.fp16.safetensors`.
    """

    folder: Path | None = None
    repo: str | None = None
    revision: str | None = None
    file: str | None = None
    variant: str | None = None

    __pydantic_config__: ClassVar = {"extra": "forbid"}
