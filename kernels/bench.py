"""Measures each of our operations against PyTorch's best, at the shapes with which the models call it.

`python -m kernels.bench` on a machine with a GPU measures all sites and appends to `kernels/results/<gpu>.json`, with versions
and date: the record that decides where a kernel is used. Each operation is recorded as soon as it is measured, so a run
that is stopped loses only one. Without a GPU it runs tiny shapes, compares values and records nothing.
"""

import argparse
import json
import multiprocessing
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import import_module
from itertools import groupby
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kernels.choice import Shape, record_of, winners

SITES_IN = ("kernels.bench_attention", "kernels.bench_fusions")
"""Modules with a tuple `SITES`. To add a kernel's sites, write such a module and name it here."""
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
"""Limit of the largest difference between two ways, as a share of the largest value. Above it is an error, not rounding."""

Way = Callable[[], Tensor]
"""One call of one implementation on prepared inputs. All ways of a contest give the same values in the same order."""


@dataclass(frozen=True)
class Contest:
    """ours, theirs: ways by name, e.g. a tile's or a back end's. A way may raise `RuntimeError` if it does not support this.

    shape: as the operation's `site` returns it; `choice.py` looks results up by it.
    """

    shape: Shape
    ours: Mapping[str, Way]
    theirs: Mapping[str, Way]


@dataclass(frozen=True)
class Site:
    """One operation at one place of a model. calls: in a step of its UNet. prepare: (device, dtype, tiny) -> inputs and ways."""

    operation: str
    name: str
    calls: int
    prepare: Callable[[torch.device, torch.dtype, bool], Contest]


@dataclass(frozen=True)
class Result:
    """One site's. ours, theirs: microseconds of a call by way. refused: why a way did not run. difference: largest, relative."""

    operation: str
    site: str
    shape: Shape
    calls: int
    ours: dict[str, float]
    theirs: dict[str, float]
    refused: dict[str, str]
    difference: float

    @property
    def gain(self) -> float:
        """The time of their best way divided by that of our best; nan if either side has none."""
        return min(self.theirs.values()) / min(self.ours.values()) if self.ours and self.theirs else float("nan")


def all_sites() -> tuple[Site, ...]:
    """Every registered site."""
    return tuple(site for name in SITES_IN for site in import_module(name).SITES)


class GPULostError(RuntimeError):
    """The GPU can no longer be used: every later call in this process would fail."""


@torch.inference_mode()
def compare(site: Site, device: torch.device, dtype: torch.dtype, *, tiny: bool = False) -> tuple[Contest, dict[str, str], float]:
    """Runs every way once. Returns the contest, why some ways did not run, and the largest relative difference.

    All are compared with the first of theirs. Raises `ArithmeticError` if values differ, and `GPULostError`.
    """
    # All ways of a site are closures of one function. dynamo compiles by function, and silently stops after 8 of them.
    torch.compiler.reset()
    torch.manual_seed(0)
    contest = site.prepare(device, dtype, tiny)
    expected: Tensor | None = None
    refused: dict[str, str] = {}
    difference = 0.0
    for name, way in {**contest.theirs, **contest.ours}.items():
        try:
            got = _first_run(way, device)
        except RuntimeError as error:
            check_alive(device, f"{site.operation}, {site.name}: {name}", error)
            refused[name] = str(error).strip().splitlines()[0][:200]
            continue
        expected = got if expected is None else expected
        apart = ((got.reshape(expected.shape) - expected).abs().max() / expected.abs().max()).item()
        if not apart <= TOLERANCE[dtype]:
            raise ArithmeticError(f"{site.operation}, {site.name}: {name} is {apart:.1e} from the first of theirs")
        difference = max(difference, apart)
    return contest, refused, difference


@torch.inference_mode()
def measure(site: Site, device: torch.device, dtype: torch.dtype, *, tiny: bool = False) -> Result:
    """Compares the values of all ways, then times each that ran. Raises what `compare` raises."""
    contest, refused, difference = compare(site, device, dtype, tiny=tiny)
    ours, theirs = (
        {name: microseconds(way, device) for name, way in ways.items() if name not in refused}
        for ways in (contest.ours, contest.theirs)
    )
    return Result(site.operation, site.name, contest.shape, site.calls, ours, theirs, refused, difference)


def _first_run(way: Way, device: torch.device) -> Tensor:
    """The way's result, after waiting for it: an error that a GPU reports late is then blamed on this way, not on the next."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns of every reason why a back end cannot run; the record has the error
        got = way()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return got


def check_alive(device: torch.device, who: str, error: Exception) -> None:
    """Raises `GPULostError` if the error makes the GPU unusable for this process, as an illegal access does."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        raise GPULostError(f"{who} left the GPU unusable: {error}") from error


def microseconds(way: Way, device: torch.device) -> float:
    """The median time of a call; on a GPU the L2 cache is emptied before each."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return float(do_bench(way, warmup=5, rep=30, return_mode="median")) * 1e3  # warmup and rep are in ms, emptying included
    times = []
    for _ in range(3):
        start = perf_counter()
        way()
        times.append((perf_counter() - start) * 1e6)
    return median(times)


def measure_sites(
    sites: Iterable[Site], device: torch.device, dtype: torch.dtype, console: Console, folder: Path | None = None
) -> bool:
    """Measures and shows the sites, operation by operation. On a GPU also records them, in `folder` or where choices are read.

    Returns whether all ways agreed; a site where they differ is reported and not recorded. Raises `GPULostError` after recording.
    """
    agreed, on_gpu = True, device.type == "cuda"
    for operation, of_operation in groupby(sorted(sites, key=lambda site: site.operation), key=lambda site: site.operation):
        results: list[Result] = []
        started = perf_counter()
        try:
            for site in of_operation:
                try:
                    results.append(measure(site, device, dtype, tiny=not on_gpu))
                except ArithmeticError as exc:
                    console.print(f"{operation}: {exc}", markup=False)
                    agreed = False
                if on_gpu:
                    torch.cuda.empty_cache()
        finally:
            console.print(shown(results), f"{operation}: {perf_counter() - started:.0f} s")
            if on_gpu and results:
                console.print(f"Recorded in {append(folder, results, device, dtype)}.", markup=False)
                winners.cache_clear()  # later choices use the new record
    return agreed


def compile_ahead(sites: Sequence[Site], device: torch.device, dtype: torch.dtype, workers: int) -> None:
    """Runs every site once, in `workers` processes, to fill the compilers' caches on disk: a kernel compiles on one core only."""
    names = [(site.operation, site.name) for site in sites]
    shares = [(frozenset(names[i::workers]), device, dtype) for i in range(workers)]
    with suppress(BrokenProcessPool), ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile, shares))


def _compile(share: tuple[frozenset[tuple[str, str]], torch.device, torch.dtype]) -> None:
    names, device, dtype = share
    inductor: Any = torch._inductor.config
    with inductor.patch(compile_threads=1, autotune_local_cache=False):  # timings made while others use the GPU are not kept
        for site in all_sites():
            if (site.operation, site.name) in names:
                with suppress(ArithmeticError, RuntimeError):  # reported when it is measured
                    compare(site, device, dtype, tiny=device.type != "cuda")
                torch.cuda.empty_cache()


def append(folder: Path | None, results: Iterable[Result], device: torch.device, dtype: torch.dtype) -> Path:
    """Adds a run to the GPU's file, a list of runs, each of one machine, one dtype and one moment. folder: as in `record_of`."""
    path = record_of(torch.cuda.get_device_name(device), folder)
    runs = json.loads(path.read_text()) if path.exists() else []
    run = circumstances(device, dtype)
    run["results"] = [asdict(result) | {"gain": round(result.gain, 3)} for result in results]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([*runs, run], indent=1) + "\n")
    return path


@cache
def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What this GPU reaches at most: TB/s of a large copy, counting reads and writes, and TFLOP/s of a large product."""
    source = torch.ones(2**31, dtype=torch.uint8, device=device)
    a, b = torch.randn(2, 8192, 8192, dtype=dtype, device=device)
    copying, product = (microseconds(way, device) for way in (source.clone, lambda: a @ b))
    return {
        "copy_tb_per_s": round(2 * source.numel() / copying / 1e6, 2),
        "product_tflop_per_s": round(2 * 8192**3 / product / 1e6),
    }


def circumstances(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What a figure depends on besides the code: GPU, its ceilings, versions, dtype; and the date."""
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    versions["cudnn"] = torch.backends.cudnn.version()
    run = {
        "gpu": torch.cuda.get_device_name(device),
        "capability": torch.cuda.get_device_capability(device),
        "versions": versions,
    }
    run |= {"ceilings": ceilings(device, dtype)} if torch.cuda.is_available() else {}
    return run | {"date": datetime.now(UTC).isoformat(timespec="seconds"), "dtype": str(dtype).removeprefix("torch.")}


def shown(results: Iterable[Result]) -> Table:
    """The results as a table: the best way of each side."""
    table = Table("operation", "site", "calls", "best of theirs", "us", "best of ours", "us", "gain", "difference")
    for result in results:
        cells = [cell for side in (result.theirs, result.ours) for cell in _best(side)]
        row = (result.operation, result.site, str(result.calls), *cells)
        table.add_row(*row, f"{result.gain:.2f}", f"{result.difference:.0e}")
    return table


def _best(times: Mapping[str, float]) -> Iterator[str]:
    name = min(times, key=lambda name: times[name], default="none")
    yield from (name, f"{times[name]:.0f}" if times else "")


def main(arguments: list[str] | None = None) -> int:
    """Measures the sites whose operation or name contains the given word, or all. Returns 1 if a way gave other values."""
    parser = argparse.ArgumentParser(prog="kernels.bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("word", nargs="?", default="", help="only sites whose operation or name contains this")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--results", type=Path, help="the folder to record in; kernels/results if none is named")
    parser.add_argument("--workers", type=int, default=0, help="compile first, in this many processes; on a GPU only")
    options = parser.parse_args(arguments)
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 180)
    sites = [site for site in all_sites() if options.word in f"{site.operation} {site.name}"]
    if not torch.cuda.is_available():
        agreed = measure_sites(sites, torch.device("cpu"), torch.float32, console)
        console.print("No GPU here: tiny shapes, values compared, nothing recorded.")
        return 0 if agreed else 1
    device, dtype = torch.device("cuda"), getattr(torch, options.dtype)
    if options.workers:
        started = perf_counter()
        compile_ahead(sites, device, dtype, options.workers)
        console.print(f"Compiled ahead in {perf_counter() - started:.0f} s.")
    return 0 if measure_sites(sites, device, dtype, console, options.results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
