"""Decides where our kernels run: where a recorded measurement has them faster than every way of PyTorch's.

A measurement counts for its site, GPU and dtype. Everything else runs PyTorch's operations. `make bench-kernels` measures and
records (`results/`, one file a GPU). An entry says which tile won, so the same record gives the same bits. Inductor's fused code
is compared only for a compiled model, because eager modules cannot use it. Exported graphs hold PyTorch's operations, for which
their runtime has kernels of its own, or a plugin of ours.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
INDUCTOR = "inductor"
"""The name of inductor's way in a record."""

Shape = tuple[int, ...]
"""The sizes that a choice depends on, as the operation's `site` gives them. The number of images or clips is not among them."""

T = TypeVar("T")

_forced: Literal["kernels", "pytorch"] | None = None

_folder = RESULTS

_plugins: frozenset[str] = frozenset()


@contextmanager
def plugins(operations: Iterable[str]) -> Iterator[None]:
    """Graphs exported in this context keep these operations as nodes of their own, for a plugin that runs our kernel."""
    global _plugins
    before, _plugins = _plugins, frozenset(operations)
    try:
        yield
    finally:
        _plugins = before


def exporting() -> bool:
    """Whether a graph is being exported. In torch 2.11 `is_exporting` alone is true while `torch.compile` traces, too."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def exports_natively(operation: str) -> bool:
    """Whether a graph is being exported that uses PyTorch's operations instead of this one."""
    return exporting() and operation not in _plugins


@contextmanager
def forced(back_end: Literal["kernels", "pytorch"]) -> Iterator[None]:
    """Ignores the measurements: always our kernels with their first tile, or always PyTorch's. For tests and benchmarks."""
    global _forced
    before, _forced = _forced, back_end
    try:
        yield
    finally:
        _forced = before


@contextmanager
def records_in(folder: Path | None) -> Iterator[None]:
    """Makes choices by the records in `folder`, and reads them anew. None keeps the folder in use, by default `RESULTS`."""
    global _folder
    before, _folder = _folder, folder or _folder
    winners.cache_clear()
    try:
        yield
    finally:
        _folder = before
        winners.cache_clear()


def record_of(gpu: str, folder: Path | None = None) -> Path:
    """The file of a GPU by its name, e.g. "NVIDIA H200". folder: None is the one in use for choices."""
    return (folder or _folder) / f"{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"


def choices(gpu: str) -> tuple[str | None, bytes | None]:
    """What decides where our kernels run on this GPU: a forced back end, and the record. None of either is possible."""
    record = record_of(gpu)
    return _forced, record.read_bytes() if record.exists() else None


def chosen(operation: str, shape: Shape, x: Tensor, tiles: Sequence[T]) -> T | None:
    """The tile with which our kernel runs for x, on CUDA, or None for PyTorch's operation.

    tiles: those that the kernel supports; the first is the default. fp32 always runs PyTorch's: matrix units would round its
    inputs, and without them a tile spills registers.
    """
    if x.element_size() != 2 or not tiles or _forced == "pytorch":
        return None
    if _forced == "kernels":
        return tiles[0]
    won = winners(torch.cuda.get_device_name(x.device), str(x.dtype).removeprefix("torch."), compiled=False)
    name = won.get((operation, shape))
    return next((tile for tile in tiles if str(tile) == name), None)


def prefers_kernel(operation: str, shape: Shape, x: Tensor) -> bool:
    """Whether to call our operation where PyTorch's could do the same. Called while a model runs or is traced."""
    if exporting() or _forced == "pytorch":
        return False
    if _forced == "kernels":
        return True
    return x.is_cuda and _wins(operation, shape, x.dtype, x.device.index, torch.compiler.is_compiling())


def _wins(operation: str, shape: Shape, dtype: torch.dtype, device: int, compiled: bool) -> bool:
    won = winners(torch.cuda.get_device_name(device), str(dtype).removeprefix("torch."), compiled=compiled)
    return (operation, shape) in won


# Called once in a compiled model. It is what `torch.compiler.assume_constant_result` does, which imports the compiler: a second.
_wins._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def winners(gpu: str, dtype: str, *, compiled: bool) -> dict[tuple[str, Shape], str]:
    """The tile of every site where our kernel is faster in the newest measurement. dtype: e.g. "float16".

    compiled: it must be faster than inductor's code, too.
    """
    path = record_of(gpu)
    found: dict[tuple[str, Shape], str] = {}
    for run in json.loads(path.read_text()) if path.exists() else ():
        if run["dtype"] != dtype:
            continue
        for result in run["results"]:
            site = (result["operation"], tuple(result["shape"]))
            found.pop(site, None)
            ours = result["ours"]
            rivals = [time for name, time in result["theirs"].items() if compiled or name != INDUCTOR]
            if ours and rivals and min(ours.values()) < min(rivals):
                found[site] = min(ours, key=lambda name: ours[name])
    return found
