"""The kernels' own benchmark as a part of this one; its records are its own."""

from itertools import groupby
from pathlib import Path

import torch
from rich.console import Console

from kernels.bench import Result, all_sites, append, measure, shown
from kernels.choice import RESULTS, winners


def measure_kernels(device: torch.device, dtype: torch.dtype, console: Console, folder: Path | None = None) -> bool:
    """All sites, on a GPU recorded in `folder`, or where the kernels' own benchmark does, operation by operation.

    Returns whether all ways agreed; a site where they do not is told and left out.
    """
    agreed = True
    for operation, sites in groupby(sorted(all_sites(), key=lambda site: site.operation), key=lambda site: site.operation):
        results: list[Result] = []
        for site in sites:
            try:
                results.append(measure(site, device, dtype, tiny=device.type != "cuda"))
            except ArithmeticError as exc:
                console.print(f"{operation}: {exc}", markup=False)
                agreed = False
            if device.type == "cuda":
                torch.cuda.empty_cache()
        console.print(shown(results))
        if device.type == "cuda" and results:
            append(folder or RESULTS, results, device, dtype)
    winners.cache_clear()  # what follows runs by the new record
    return agreed
