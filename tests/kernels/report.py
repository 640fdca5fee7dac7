"""Resources that our kernels need on a GPU, from the tests' offline compilations, as a table. `python -m tests.kernels.report`.

Each row is one kernel for one kind of GPU, over all tiles, head dimensions and dtypes that the tests compile: the most
registers per thread, the most shared memory per block, and the loads and stores of spilled registers.
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import triton

from tests.kernels.offline import REPORT, SHARED_BYTES
from tests.load.report import Report, table


def compilations(folder: Path) -> list[dict[str, Any]]:
    """The tests' compilations, one dict each. Raises `CalledProcessError` if a test fails."""
    lines = folder / "compilations"
    command = [sys.executable, "-m", "pytest", "-q", "tests/kernels", "-k", "fit"]
    subprocess.run(command, check=True, env=os.environ | {REPORT: str(lines)})
    return [json.loads(line) for line in lines.read_text().splitlines()]


def main() -> None:
    report = Report("compiled", "Kernels compiled for GPUs that are not here", __doc__, "`python -m tests.kernels.report`")
    report.add(f"Triton {triton.__version__}, with the assembler in its wheel. Nothing here has run on a GPU.")
    groups: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    with TemporaryDirectory() as folder:
        for found in compilations(Path(folder)):
            groups[found["kernel"], found["capability"]].append(found)
    shown = table("by kernel and compute capability", "kernel", "sm", "forms", "registers", "shared KiB", "of", "spills")
    for (kernel, capability), forms in sorted(groups.items()):
        registers, shared = (max(form[name] for form in forms) for name in ("registers", "shared"))
        row = (registers, f"{shared / 1024:.0f}", SHARED_BYTES[capability] // 1024, sum(form["spills"] for form in forms))
        shown.add_row(kernel, str(capability), str(len(forms)), *map(str, row))
    report.add(shown)
    report.save()


if __name__ == "__main__":
    main()
