"""Where a kernel of ours runs: at the sites, on the GPU and in the dtype at which a recorded measurement has it faster than
every way that PyTorch has there. All else is PyTorch's.

`make bench-kernels` measures and records (`results/`, one file a GPU). An entry says which tile won, so the same record gives
the same bits. What inductor fuses is a rival only in a compiled model: modules that run as they are cannot have it.
Exported graphs hold PyTorch's operations, for which their run time has kernels of its own, or a plugin of ours.
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
    """Whether a graph is being exported in which PyTorch's operations take the place of this one."""
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
    """Choices by the records of another folder than `RESULTS`, and by what was added to them meanwhile. None changes nothing."""
    global _folder
    before, _folder = _folder, folder or _folder
    winners.cache_clear()
    try:
        yield
    finally:
        _folder = before
        winners.cache_clear()


def record_of(gpu: str, folder: Path | None = None) -> Path:
    """The file of a GPU by its name, e.g. "NVIDIA H200". folder: None for the one that choices are made by."""
    return (folder or _folder) / f"{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"


def chosen(operation: str, shape: Shape, x: Tensor, tiles: Sequence[T]) -> T | None:
    """The tile that our kernel runs with for x, on CUDA, or None for PyTorch's. tiles: those that the kernel can, the first by
    default.

    fp32 is PyTorch's: matrix units round its inputs, and without them a tile spills.
    """
    if x.element_size() != 2 or not tiles or _forced == "pytorch":
        return None
    if _forced == "kernels":
        return tiles[0]
    won = winners(torch.cuda.get_device_name(x.device), str(x.dtype).removeprefix("torch."), compiled=False)
    name = won.get((operation, shape))
    return next((tile for tile in tiles if str(tile) == name), None)


def prefers_kernel(operation: str, shape: Shape, x: Tensor) -> bool:
    """Whether to call an operation that PyTorch, and inductor better, can do without one: asked as a model runs or is traced."""
    if exporting() or _forced == "pytorch":
        return False
    if _forced == "kernels":
        return True
    return x.is_cuda and _wins(operation, shape, x.dtype, x.device.index, torch.compiler.is_compiling())


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # a compiled model asks once
def _wins(operation: str, shape: Shape, dtype: torch.dtype, device: int, compiled: bool) -> bool:
    won = winners(torch.cuda.get_device_name(device), str(dtype).removeprefix("torch."), compiled=compiled)
    return (operation, shape) in won


@cache
def winners(gpu: str, dtype: str, *, compiled: bool) -> dict[tuple[str, Shape], str]:
    """The tile of every site at which the newest measurement has ours ahead. dtype: as "float16".

    compiled: ahead of what inductor makes of the operation, too.
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
