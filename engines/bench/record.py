"""Shows the benchmark's rows as a table and records them in the GPU's file."""

import json
import math
import subprocess
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text

from engines.bench.measure import Row
from engines.bench.options import Options
from kernels.bench import circumstances
from kernels.choice import record_of

RESULTS = Path(__file__).parents[1] / "results"


class Record:
    """One run in the GPU's file, a list of runs. The file is replaced atomically as rows come, so it is always complete."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, options: Options):
        self.path = record_of(torch.cuda.get_device_name(device), folder)
        self._runs = json.loads(self.path.read_text()) if self.path.exists() else []
        asked = {name: value for name, value in asdict(options).items() if name != "compile_until"}  # means nothing later
        self._run = circumstances(device, dtype) | {"driver": _driver(), "options": asked}
        self._run["versions"] |= {name: version(name) for name in ("diffusers", "transformers")}
        self._run["cudnn_benchmark"] = torch.backends.cudnn.benchmark

    def write(self, rows: Iterable[Row]) -> None:
        """Writes all rows so far."""
        run = self._run | {"results": [told(row) for row in rows]}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".draft")
        draft.write_text(json.dumps([*self._runs, run], indent=1) + "\n")
        draft.replace(self.path)


def told(row: Row) -> dict[str, object]:
    """A row as the file holds it: with the median if there is one, and with None for a difference that JSON cannot express."""
    fields: dict[str, object] = asdict(row)
    if row.difference is not None and not math.isfinite(row.difference):
        fields["difference"] = None
    return fields | {"median_s": row.median_s} if row.times_s else fields


def table(rows: list[Row]) -> Table:
    """The rows as a table. speed-up: against the first way of the case. working: memory beyond weights and inputs."""
    shown = Table("model", "case", "way", "ms", "range", "speed-up", "ready in s", "working GB", "difference")
    first: dict[str, Row] = {}
    for row in rows:
        base = first.setdefault(row.case, row)
        if row.refused:
            shown.add_row(row.model, row.case, row.way, "", Text(row.refused.splitlines()[0][:60]))
            continue
        ms = [time * 1e3 for time in row.times_s] or [float("nan")]
        shown.add_row(
            row.model,
            row.case,
            row.way,
            f"{row.median_s * 1e3:.1f}",
            f"{min(ms):.1f}..{max(ms):.1f}",
            f"{base.median_s / row.median_s:.2f}",
            f"{row.prepare_s:.1f}",
            "" if row.working_bytes is None else f"{row.working_bytes / 1e9:.2f}",
            f"{row.difference:.0e}" + ("" if row.agrees else ": NOT THE SAME WORK"),
        )
    return shown


def _driver() -> str | None:
    """The NVIDIA driver's version, or None without `nvidia-smi`."""
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
