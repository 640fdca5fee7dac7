"""The trained checkpoints that come with the package, made by `make demo-weights`. Does not import torch."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
"""A folder a model, in the published layouts."""


def shipped(model: str) -> Path | None:
    """The folder of a model's trained checkpoint, or None if the package has none. model: "animatediff" or "controlnext"."""
    folder = WEIGHTS / model
    return folder if folder.is_dir() else None
