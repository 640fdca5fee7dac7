"""One SHA-256 of everything that a result's bits depend on: values with the same fingerprint are equal to the last bit.

A render is resumed only under the fingerprint that it began with: the same conditioning, weights and arithmetic. Files of weights
are the exception: only samples of them are read.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines.checkpoints.source import Source
from kernels.choice import choices

SAMPLES, SAMPLE_BYTES = 64, 4096
"""How much is read of a file of weights: other weights differ nearly everywhere, and reading a whole checkpoint takes seconds."""

LIBRARIES = ("triton", "tensorrt", "tensorrt-rtx")
"""Distributions whose code computes on a GPU, besides torch's own."""


def fingerprint_of(*values: Any) -> str:
    """64 hex digits. values: plain ones, paths, tensors, and tuples, dicts and dataclasses of these.

    A folder `Source` counts by the content of its files, not by its path; a hub repo counts by its name and revision. Raises
    `TypeError` for all else.
    """
    digest = hashlib.sha256()
    for part in _parts(values):
        digest.update(part)
    return digest.hexdigest()


def arithmetic_of(device: str) -> tuple[Any, ...]:
    """What else the bits of a step depend on: the library, the device and, on a CPU, among how many threads a sum is split."""
    if torch.device(device).type == "cuda":
        gpu = torch.cuda.get_device_name(device)
        libraries = tuple((name, _version(name)) for name in LIBRARIES)
        return torch.__version__, torch.version.cuda, torch.backends.cudnn.version(), libraries, gpu, choices(gpu)
    return torch.__version__, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _parts(value: Any) -> Iterator[bytes | memoryview]:
    """Each part begins with its type and length, so that no two values have the same parts."""
    if isinstance(value, Source):
        yield from _parts(_contents(value))
    elif isinstance(value, Tensor):
        yield from _parts((str(value.dtype), tuple(value.shape)))
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _parts(type(value).__qualname__)
        yield from _parts({field.name: getattr(value, field.name) for field in fields(value)})
    elif isinstance(value, tuple):
        yield f"tuple {len(value)}:".encode()
        for item in value:
            yield from _parts(item)
    elif isinstance(value, dict):
        yield from _parts(tuple(sorted(value.items())))
    elif value is None or isinstance(value, bool | int | float | str | bytes | Path):
        text = repr(value).encode()
        yield f"{type(value).__name__} {len(text)}:".encode()
        yield text
    else:
        raise TypeError(f"{type(value).__name__} has no fingerprint")


def _contents(source: Source) -> tuple[Any, ...]:
    if source.folder is None:
        return source.repo, source.revision, source.file, source.variant
    paths = [source.folder / source.file] if source.file else sorted(source.folder.rglob("*"))
    return source.variant, *(_sampled(path, str(path.relative_to(source.folder))) for path in paths if path.is_file())


def _sampled(path: Path, name: str) -> tuple[Any, ...]:
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for i in range(SAMPLES):
            digest.update(os.pread(file.fileno(), SAMPLE_BYTES, i * max(size - SAMPLE_BYTES, 0) // (SAMPLES - 1)))
    return name, size, digest.hexdigest()
