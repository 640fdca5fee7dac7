"""What a clip was made with, for its receipt: who has the same weights and options can make it again."""

from dataclasses import fields, is_dataclass
from typing import Any

import torch

from engines.checkpoints.fingerprint import fingerprint_of
from engines.checkpoints.source import Source


def weights_of(config: Any) -> dict[str, Any]:
    """Part -> a hub repo and its revision, or the fingerprint of a folder's files, whose path is nobody's business; and the
    numbers that belong to the weights, such as a LoRA's scale. Empty for a model without weights. It reads samples of the files.
    """
    weights = getattr(config, "weights", None)
    if not is_dataclass(weights):
        return {}
    parts = {field.name: getattr(weights, field.name) for field in fields(weights)}
    return {name: _named(part) if isinstance(part, Source) else part for name, part in parts.items() if part is not None}


def options_of(config: Any) -> dict[str, Any]:
    """What else the bits depend on besides the request and its engine."""
    return {"dtype": config.dtype, "device": config.device, "torch": torch.__version__}


def _named(source: Source) -> dict[str, Any]:
    if source.folder is not None:
        return {"fingerprint": fingerprint_of(source)}
    named = {"repo": source.repo, "revision": source.revision, "file": source.file, "variant": source.variant}
    return {name: value for name, value in named.items() if value is not None}
