"""Converts a published pickle to safetensors, by a reader that accepts only tensors: opening a pickle may run any code."""

import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from engines.checkpoints.source import DType
from engines.checkpoints.weights import Tensors, torch_dtype
from engines.errors import WeightsError


def convert_weights(source: Path, target: Path, dtype: DType | None = None) -> Tensors:
    """Write the tensors of `source`, a `torch.save`d state dict or one under "state_dict", to `target`; returns them.

    dtype: floating-point tensors are cast to it; None keeps theirs. `target` appears only when it is complete.
    Raises `WeightsError` for a file that holds anything but named tensors; nothing in it is executed.
    """
    if target.suffix != ".safetensors":
        raise WeightsError(f"{target}: name a .safetensors file")
    tensors = {name: _cast(value, dtype) for name, value in _named_tensors(_load(source), source).items()}
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, draft)
        os.replace(draft, target)
    except OSError as exc:
        raise WeightsError(f"{target} cannot be written: {exc}") from exc
    finally:
        draft.unlink(missing_ok=True)
    return tensors


def _load(path: Path) -> Any:
    try:
        with warnings.catch_warnings(action="ignore"):  # warnings of the pickle protocol, in a file that may not be a pickle
            return _read(path)
    except pickle.UnpicklingError as exc:
        raise WeightsError(f"{path} holds more than tensors and is not read") from exc
    except Exception as exc:  # on garbage the unpickler may raise anything: IndexError, AttributeError, ...
        raise WeightsError(f"{path} cannot be read as a torch file: {exc}") from exc


def _read(path: Path) -> Any:
    # today's zip format can be memory-mapped, so that 6 GB need not be in memory at once; the older format cannot
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _named_tensors(content: Any, path: Path) -> Tensors:
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        raise WeightsError(f"{path} holds no named tensors")
    if odd := [name for name, value in content.items() if not isinstance(name, str) or not isinstance(value, Tensor)]:
        raise WeightsError(f"{path}: {odd[0]!r} is not a named tensor")
    return content


def _cast(value: Tensor, dtype: DType | None) -> Tensor:
    """A copy, because safetensors refuses tensors that share memory."""
    return value.to(torch_dtype(dtype) if dtype and value.is_floating_point() else value.dtype).clone().contiguous()
