"""Shared by the benchmarks: a description of the machine, and tables for the console and for a Markdown file."""

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).with_name("results")
_PACKAGES = ("torch", "diffusers", "transformers", "ray")


class Report:
    """Tables and text, shown as they are added; `save` writes them to `results/<name>.md`, replacing the last run's.

    doc: the benchmark's own docstring: what follows its first line comes first, but for indented lines, which show its use.
    command: how to repeat the measurement, in Markdown.

    Each benchmark has one file, which is rewritten; git has its history.
    """

    def __init__(self, name: str, title: str, doc: str | None, command: str | None = None):
        self.name = name
        self.command = command or f"`python -m tests.load.bench_{name}` (`make bench`)"
        self.title = title
        self.console = Console()
        self.console.width = max(self.console.width, 120)
        self.parts: list[Table | str] = []
        self.load_before = os.getloadavg()[0]
        self.console.rule(title)
        paragraphs = (doc or "").split("\n\n")[1:]
        self.add(" ".join(" ".join(text for text in paragraphs if not text.startswith("    ")).split()))

    def add(self, part: Table | str) -> None:
        """Shows a table or a paragraph, and keeps it for the file."""
        self.parts.append(part)
        self.console.print(part)

    def conclude(self, faults: Sequence[str], *, save: bool) -> int:
        """Adds the broken promises that were found; writes the file if asked to. Returns the command's exit status."""
        self.add(f"Broken promises: {len(faults) or 'none'}.")
        for fault in faults[:50]:
            self.add(fault)
        if save:
            self.save()
        return bool(faults)

    def save(self) -> None:
        """Writes the file."""
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{self.name}.md"
        with path.open("w") as file:
            file.write(f"# {self.title}\n\n{self._circumstances()}\n")
            for part in self.parts:
                file.write(f"\n{part if isinstance(part, str) else _markdown(part)}\n")
        self.console.print(f"kept in {path}")

    def _circumstances(self) -> str:
        load = f"{self.load_before:.1f} before, {os.getloadavg()[0]:.1f} after"
        spin = os.environ.get("GOMP_SPINCOUNT", "unset")
        return "\n".join(
            (
                f"- taken {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by {self.command}",
                f"- {_cpu_model()}, {os.cpu_count()} cores; load {load}; GOMP_SPINCOUNT {spin}",
                f"- {torch.get_num_threads()} torch threads in each process",
                f"- Python {platform.python_version()}, {', '.join(f'{package} {version(package)}' for package in _PACKAGES)}",
            )
        )


def table(title: str, *columns: str) -> Table:
    """An empty table; all columns but the first hold numbers."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE)
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i else "left")
    return made


def _markdown(part: Table) -> str:
    title, part.title, part.box = part.title, None, box.MARKDOWN
    console = Console(width=240)
    with console.capture() as captured:
        console.print(part)
    return f"## {title}\n\n{captured.get().strip()}"


def ms(seconds: float) -> str:
    """A time as the tables show it."""
    return f"{seconds * 1000:.0f}"


def percentile(values: Sequence[float], percent: int) -> float:
    """The value that `percent` % of `values` do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[round((len(ordered) - 1) * percent / 100)]


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
