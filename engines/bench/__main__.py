"""Benchmarks both models at full size on this GPU: UNet calls and whole jobs against diffusers in one process, and the kernels.

    python -m engines.bench --gpu [--only unet|jobs|kernels] [--model animatediff|controlnext] [--steps N] [--quick]

Weights are random, so it needs no checkpoint and no hub. Results are written as soon as they are measured, to
`engines/results/<gpu>.json` and for kernels to `kernels/results/` (or below `--results`), so a run that is stopped loses only the
measurement in progress. `--tiny` runs the same code on a CPU and records nothing.

Compiling with tuned kernels takes minutes a shape. If time is short, choose one part and one model at a time, or use `--quick`,
or set `--compile-within` to less than the time available, so that the ways without a compiler are measured in any case.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console

from engines.bench import nets as sizes
from engines.bench.job_cases import job_cases
from engines.bench.measure import Case, Row, measure
from engines.bench.nets import AnimateDiffNets, ControlNeXtNets, animatediff_nets, controlnext_nets
from engines.bench.options import Options
from engines.bench.record import RESULTS, Record, table
from engines.bench.unet_cases import animatediff_cases, controlnext_cases
from engines.diffusion.arithmetic import exact_arithmetic
from kernels.bench import all_sites, measure_sites
from kernels.choice import records_in

MODELS = ("animatediff", "controlnext")
PARTS = ("unet", "jobs", "kernels")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command. Returns 1 if a way did not run or its values differ from diffusers', 2 without a GPU, else 0."""
    asked = _parser().parse_args(arguments)
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 180)
    if asked.gpu and not torch.cuda.is_available():
        console.print("No GPU found. `--tiny` checks on a CPU that the benchmark works; `make bench` measures what a CPU can.")
        return 2
    device = torch.device("cuda" if asked.gpu else "cpu")
    dtype = getattr(torch, asked.dtype) if asked.gpu else torch.float32
    exact_arithmetic()  # as in the service
    parts = asked.only or PARTS
    agreed = True
    with records_in(asked.results and asked.results / "kernels"):
        if "kernels" in parts:  # first, because the models choose kernels by this record
            agreed = measure_sites(all_sites(), device, dtype, console)
        if set(parts) - {"kernels"}:
            options = _options(asked)
            folder = asked.results / "engines" if asked.results else RESULTS
            record = Record(folder, device, dtype, options) if asked.gpu else None
            rows = _measure_models(asked.model or MODELS, parts, device, dtype, options, console, record)
            agreed = all(row.agrees and not row.refused for row in rows) and agreed
    console.print("Recorded." if asked.gpu else "Tiny sizes on a CPU: values compared, nothing recorded.")
    return 0 if agreed else 1


def measure_model(
    model: str,
    parts: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    options: Options,
    tell: Callable[[list[Row]], None],
) -> list[Row]:
    """Measures a model, on a CPU at tiny sizes, and returns its rows. tell: called with all rows so far whenever some are new."""
    nets = build_nets(model, device, dtype)
    rows: list[Row] = []
    for case in cases(nets, parts, options):
        done = list(rows)
        for of_case in measure(case, device, dtype, options.compile_until):
            rows = [*done, *of_case]
            tell(rows)
        torch.compiler.reset()  # which would keep compiled nets in memory
    return rows


def build_nets(model: str, device: torch.device, dtype: torch.dtype) -> AnimateDiffNets | ControlNeXtNets:
    """A model's nets, ours and diffusers'; tiny ones on a CPU."""
    tiny = device.type == "cpu"
    if model == "animatediff":
        return animatediff_nets(sizes.TINY_ANIMATEDIFF if tiny else sizes.AnimateDiffSize(), device, dtype)
    return controlnext_nets(sizes.TINY_CONTROLNEXT if tiny else sizes.ControlNeXtSize(), device, dtype)


def cases(nets: AnimateDiffNets | ControlNeXtNets, parts: Sequence[str], options: Options) -> Iterator[Case]:
    """The cases of one model."""
    unet = animatediff_cases(nets, options) if isinstance(nets, AnimateDiffNets) else controlnext_cases(nets, options)
    return chain(unet if "unet" in parts else (), job_cases(nets, options) if "jobs" in parts else ())


def _measure_models(
    models: Sequence[str],
    parts: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    options: Options,
    console: Console,
    record: Record | None,
) -> list[Row]:
    rows: list[Row] = []

    def tell(of_model: list[Row]) -> None:
        if record is not None:
            record.write([*rows, *of_model])
            console.print(table(of_model))

    for model in models:
        rows += measure_model(model, parts, device, dtype, options, tell)
    console.print(table(rows))
    return rows


def _options(asked: argparse.Namespace) -> Options:
    thorough = asked.gpu and not asked.quick
    return Options(
        graph=asked.gpu,
        inductor=asked.gpu if asked.inductor is None else asked.inductor,
        compile_theirs=asked.compile_diffusers,
        autotune=not asked.quick,
        unet_rounds=20 if thorough else 5,
        job_rounds=2 if thorough else 1,
        steps=asked.steps,
        compile_until=perf_counter() + asked.compile_within,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="engines.bench", description=(__doc__ or "").splitlines()[0])
    where: Any = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--gpu", action="store_true", help="full sizes, and record the results")
    where.add_argument("--tiny", action="store_true", help="tiny sizes on a CPU, nothing recorded")
    parser.add_argument("--only", action="append", choices=PARTS, help="this part; may be repeated")
    parser.add_argument("--model", action="append", choices=MODELS, help="this model; may be repeated")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and compilers do not tune kernels")
    parser.add_argument("--steps", type=int, help="steps of a job; by default the endpoint's")
    parser.add_argument("--inductor", action=argparse.BooleanOptionalAction, help="our compiled UNets, too; default: on a GPU")
    parser.add_argument("--compile-within", type=float, default=float("inf"), metavar="SECONDS", help="start no compiling later")
    parser.add_argument("--results", type=Path, help="record in its `kernels` and `engines`; default: their results/")
    parser.add_argument("--compile-diffusers", action="store_true", help="also measure diffusers' compiled UNets")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
