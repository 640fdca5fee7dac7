"""Every operation of ours against the best that PyTorch has, at the shapes at which the models call it.

`python -m kernels.bench` on a machine with a GPU measures all sites and appends to `kernels/results/<gpu>.json`, with versions
and date: the record that decides where a kernel is used. Without a GPU it runs tiny shapes, compares values, records nothing.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kernels.choice import RESULTS, Shape, record_of

SITES_IN = ("kernels.bench_attention", "kernels.bench_fusions")
"""The modules with a tuple `SITES`. A new kernel's sites are one file and one name here."""
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
"""Of the largest difference between two ways, as a share of the largest value: more is an error, not rounding."""

Way = Callable[[], Tensor]
"""One call of one implementation on inputs that are ready. All ways of a contest give the same values in the same order."""


@dataclass(frozen=True)
class Contest:
    """ours, theirs: ways by name, e.g. a tile's or a back end's. A way may raise `RuntimeError` where it does not serve.

    shape: as the operation's `site` gives it, by which `choice.py` finds the result.
    """

    shape: Shape
    ours: Mapping[str, Way]
    theirs: Mapping[str, Way]


@dataclass(frozen=True)
class Site:
    """One operation at one place of a model. calls: of a step of its UNet. prepare: (device, dtype, tiny) to inputs and ways."""

    operation: str
    name: str
    calls: int
    prepare: Callable[[torch.device, torch.dtype, bool], Contest]


@dataclass(frozen=True)
class Result:
    """Of one site. ours, theirs: microseconds of a call by way. refused: why a way did not run. difference: largest, relative."""

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
        """How many times as fast as the best of theirs the best of ours is; nan where either has none."""
        return min(self.theirs.values()) / min(self.ours.values()) if self.ours and self.theirs else float("nan")


def all_sites() -> tuple[Site, ...]:
    """Every registered site."""
    return tuple(site for name in SITES_IN for site in import_module(name).SITES)


@torch.inference_mode()
def measure(site: Site, device: torch.device, dtype: torch.dtype, *, tiny: bool = False) -> Result:
    """Times every way and compares its values with those of the first of theirs. Raises `ArithmeticError` where they differ."""
    torch.manual_seed(0)
    contest = site.prepare(device, dtype, tiny)
    expected: Tensor | None = None
    times: tuple[dict[str, float], dict[str, float]] = {}, {}
    refused: dict[str, str] = {}
    difference = 0.0
    for found, ways in ((times[1], contest.theirs), (times[0], contest.ours)):
        for name, way in ways.items():
            try:
                got = way()
            except RuntimeError as error:
                refused[name] = str(error).strip().splitlines()[0][:200]
                continue
            expected = got if expected is None else expected
            apart = ((got.reshape(expected.shape) - expected).abs().max() / expected.abs().max()).item()
            if not apart <= TOLERANCE[dtype]:
                raise ArithmeticError(f"{site.operation}, {site.name}: {name} is {apart:.1e} from the first of theirs")
            difference = max(difference, apart)
            del got
            found[name] = microseconds(way, device)
    return Result(site.operation, site.name, contest.shape, site.calls, *times, refused, difference)


def microseconds(way: Way, device: torch.device) -> float:
    """The median of a call, on a GPU with the L2 cache emptied before each."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return float(do_bench(way, return_mode="median")) * 1e3
    times = []
    for _ in range(3):
        start = perf_counter()
        way()
        times.append((perf_counter() - start) * 1e6)
    return median(times)


def append(folder: Path, results: Iterable[Result], device: torch.device, dtype: torch.dtype) -> Path:
    """Adds a run to the GPU's file: a list of runs, each of one machine, one dtype and one moment."""
    path = record_of(torch.cuda.get_device_name(device), folder)
    runs = json.loads(path.read_text()) if path.exists() else []
    run = circumstances(device, dtype)
    run["results"] = [asdict(result) | {"gain": round(result.gain, 3)} for result in results]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([*runs, run], indent=1) + "\n")
    return path


def circumstances(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What a figure depends on besides the code: GPU, versions, dtype; and the date."""
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    versions["cudnn"] = torch.backends.cudnn.version()
    run = {
        "gpu": torch.cuda.get_device_name(device),
        "capability": torch.cuda.get_device_capability(device),
        "versions": versions,
    }
    return run | {"date": datetime.now(UTC).isoformat(timespec="seconds"), "dtype": str(dtype).removeprefix("torch.")}


def shown(results: Iterable[Result]) -> Table:
    """The results for people: the best way of each side."""
    table = Table("operation", "site", "calls", "best of theirs", "us", "best of ours", "us", "gain", "difference")
    for result in results:
        cells = [cell for side in (result.theirs, result.ours) for cell in _best(side)]
        row = (result.operation, result.site, str(result.calls), *cells)
        table.add_row(*row, f"{result.gain:.2f}", f"{result.difference:.0e}")
    return table


def _best(times: Mapping[str, float]) -> Iterator[str]:
    name = min(times, key=lambda name: times[name], default="none")
    yield from (name, f"{times[name]:.0f}" if times else "")


def main(arguments: list[str] | None = None) -> None:
    """Measures the sites whose operation or name contains the word given, or all."""
    parser = argparse.ArgumentParser(prog="kernels.bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("word", nargs="?", default="", help="only sites whose operation or name contains this")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    options = parser.parse_args(arguments)
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 180)
    sites = [site for site in all_sites() if options.word in f"{site.operation} {site.name}"]
    if not torch.cuda.is_available():
        results = [measure(site, torch.device("cpu"), torch.float32, tiny=True) for site in sites]
        console.print(shown(results), "No GPU here: tiny shapes, values compared, nothing recorded.")
        return
    device, dtype = torch.device("cuda"), getattr(torch, options.dtype)
    results = []
    for site in sites:
        results.append(measure(site, device, dtype))
        torch.cuda.empty_cache()
    console.print(shown(results), f"Recorded in {append(RESULTS, results, device, dtype)}.")


if __name__ == "__main__":
    main()
