"""Measures the same work done in several ways, in turns: their times, their memory, and whether all give the same values."""

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from engines.bench.kernel_times import KernelTime, kernel_times
from kernels.bench import GPULostError, check_alive

Way = Callable[[], Tensor]
"""Does the work once, on prepared inputs."""

TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 3e-1}
"""Limit of the largest difference between two ways, as a share of the largest value. Above it, their work was not the same."""


@dataclass(frozen=True)
class Case:
    """The same work in several ways.

    ways: functions by name that prepare a way, which may include compiling. The others are compared with the first.
    slow: names of ways that take long to prepare; before each of them, the results so far are reported. rounds: of timing.
    profiled: whether to profile, on a GPU, which kernels take the time.
    """

    model: str
    name: str
    ways: Mapping[str, Callable[[], Way]]
    rounds: int
    slow: frozenset[str] = frozenset()
    profiled: bool = False


@dataclass(frozen=True)
class Row:
    """One way's figures.

    times_s: seconds of each round. prepare_s: seconds to prepare it, including its first run. working_bytes: peak device memory
    beyond weights and inputs, which is what it holds (a graph's memory) and what a run allocates; None on a CPU. difference: the
    largest difference from the first way's result, as a share of the largest value. refused: why it did not run; then there are
    no figures. kinds, longest: the GPU's time in one run by kind of kernel, and by kernel.
    """

    model: str
    case: str
    way: str
    times_s: tuple[float, ...] = ()
    prepare_s: float | None = None
    working_bytes: int | None = None
    difference: float | None = None
    agrees: bool = True
    refused: str = ""
    kinds: tuple[KernelTime, ...] = ()
    longest: tuple[KernelTime, ...] = ()

    @property
    def median_s(self) -> float:
        """The median of `times_s`, in seconds; nan if the way did not run."""
        return median(self.times_s) if self.times_s else float("nan")


@torch.inference_mode()
def measure(case: Case, device: torch.device, dtype: torch.dtype, slow_until: float = float("inf")) -> Iterator[list[Row]]:
    """Yields the rows so far before each slow way; the last rows are the result. A round runs each way once.

    slow_until: a time of `perf_counter` after which no slow way is started. Raises `GPULostError` after yielding the rows so far.
    """
    ready: dict[str, Way] = {}
    rows: dict[str, Row] = {}
    expected: Tensor | None = None
    for name, make in case.ways.items():
        if name in case.slow and ready:
            yield _timed(ready, rows, 1, device)
        if name in case.slow and perf_counter() > slow_until:
            rows[name] = Row(case.model, case.name, name, refused="no time left")
            continue
        try:
            way, rows[name], result = _made_ready(case, name, make, device)
        except Exception as exc:  # any error: it is reported in this way's row, and the other ways are still measured
            rows[name] = Row(case.model, case.name, name, refused=f"{type(exc).__name__}: {exc}"[:2000])
            try:
                check_alive(device, f"{case.name}: {name}", exc)
            except GPULostError:
                yield list(rows.values())
                raise
            continue
        expected = result if expected is None else expected
        apart = ((result - expected).abs().max() / expected.abs().max()).item()
        rows[name] = replace(rows[name], difference=apart, agrees=apart <= TOLERANCE[dtype])
        ready[name] = way
    timed = _timed(ready, rows, case.rounds, device)
    yield timed
    if case.profiled and device.type == "cuda":
        yield [_profiled(row, ready[row.way]) if row.way in ready else row for row in timed]


def seconds(way: Way, device: torch.device) -> float:
    """The duration of one run. On a GPU it is measured by the GPU's clock, from idle to idle."""
    if device.type != "cuda":
        started = perf_counter()
        way()
        return perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    way()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _made_ready(case: Case, name: str, make: Callable[[], Way], device: torch.device) -> tuple[Way, Row, Tensor]:
    on_cuda = device.type == "cuda"
    held = _reserved_bytes(device)
    started = perf_counter()
    way = make()
    making = perf_counter() - started
    held = max(_reserved_bytes(device) - held, 0)
    before = 0
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    started = perf_counter()
    result = way()
    if on_cuda:
        torch.cuda.synchronize(device)
    prepare_s = making + perf_counter() - started
    working_bytes = held + torch.cuda.max_memory_allocated(device) - before if on_cuda else None
    return way, Row(case.model, case.name, name, prepare_s=prepare_s, working_bytes=working_bytes), result.float()


def _timed(ready: Mapping[str, Way], rows: Mapping[str, Row], rounds: int, device: torch.device) -> list[Row]:
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds):
        for name, way in ready.items():
            times[name].append(seconds(way, device))
    return [replace(row, times_s=tuple(times.get(name, ()))) for name, row in rows.items()]


def _profiled(row: Row, way: Way) -> Row:
    kinds, longest = kernel_times(way)
    return replace(row, kinds=kinds, longest=longest)


def _reserved_bytes(device: torch.device) -> int:
    """Device memory that is in use or belongs to a CUDA graph; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)
