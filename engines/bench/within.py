"""Runs all GPU measurements of this project within a time limit, the most valuable first.

    python -m engines.bench.within --limit 900 [--results FOLDER] [--skip PART]

Each part is a process of its own that writes its record as it goes, so a part that is stopped or fails loses only the measurement
in progress. Parts that no longer fit are left out, and the summary says so. The output ends with every part's time.
"""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter


@dataclass(frozen=True)
class Part:
    """name: for the summary. least_s: not started with less time left. most_s: stopped after this time. command: to run."""

    name: str
    least_s: int
    most_s: int
    command: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """result: "done", "failed", "stopped" or "left out". seconds: how long it ran."""

    part: Part
    result: str
    seconds: float


def parts(results: Path | None) -> tuple[Part, ...]:
    """All parts, the most valuable first; parts that use the kernels' record come after the kernels. Seconds are for an H200."""
    python = sys.executable
    bench = (python, "-m", "engines.bench", "--gpu", "--quick", *(("--results", str(results)) if results else ()))
    kernels = (python, "-m", "kernels.bench", "--workers", "10", *(("--results", str(results / "kernels")) if results else ()))
    workers = ("-n", "6") if find_spec("xdist") else ()  # the tests spend more time compiling than computing
    tests = (python, "-m", "pytest", "-m", "gpu", "tests/kernels", "tests/engines", "--tb=short", "-p", "no:benchmark", *workers)
    return (
        Part("environment", 5, 30, ("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv")),
        Part("kernels", 60, 200, kernels),
        Part("UNets", 40, 120, (*bench, "--only", "unet", "--no-inductor")),
        Part("short jobs", 40, 120, (*bench, "--only", "jobs", "--no-inductor", "--steps", "4")),
        Part("tests", 60, 240, (*tests, "-k", _FP16)),
        Part("inductor", 90, 240, (*bench, "--only", "unet", "--model", "controlnext", "--compile-within", "60")),
        Part("jobs", 60, 240, (*bench, "--only", "jobs", "--no-inductor")),
        Part("other tests", 60, 240, (*tests, "-k", f"not ({_FP16})")),
    )


_FP16 = "not bfloat16 and not dtype1 and not inductor"
"""Selects the tests in the dtype that is served, which compile little."""


def run(planned: Sequence[Part], limit_s: float) -> Iterator[Outcome]:
    """Runs the parts one after the other and yields each outcome when the part ends."""
    until = perf_counter() + limit_s
    for part in planned:
        left = until - perf_counter()
        if left < part.least_s:
            yield Outcome(part, "left out", 0.0)
            continue
        _tell(f"== {part.name}: begins, {left:.0f} s left")
        started = perf_counter()
        result = _finished(part.command, min(left, part.most_s))
        yield Outcome(part, result, perf_counter() - started)


def _finished(command: Sequence[str], seconds: float) -> str:
    """Runs a command and returns how it ended. After `seconds` its process group is killed, and so all of its workers."""
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            return "failed" if process.wait(seconds) else "done"
        except subprocess.TimeoutExpired:
            return "stopped"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def _tell(words: str) -> None:
    """Prints at once, to keep the order with the parts' own output."""
    sys.stdout.write(words + "\n")
    sys.stdout.flush()


def main(arguments: list[str] | None = None) -> int:
    """Runs the command. Returns 1 unless every part was done."""
    parser = argparse.ArgumentParser(prog="engines.bench.within", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds for all parts together")
    parser.add_argument("--results", type=Path, help="the folder for records; else kernels/results and engines/results")
    parser.add_argument("--skip", action="append", default=[], help="leave this part out; may be repeated")
    asked = parser.parse_args(arguments)
    outcomes = []
    for outcome in run([part for part in parts(asked.results) if part.name not in asked.skip], asked.limit):
        _tell(f"== {outcome.part.name}: {outcome.result}, {outcome.seconds:.0f} s")
        outcomes.append(outcome)
    _tell("\n".join(f"{o.part.name:20} {o.result:10} {o.seconds:5.0f} s" for o in outcomes))
    return 0 if all(o.result == "done" for o in outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
