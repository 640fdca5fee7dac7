"""The kernels' own benchmark as a part of this one; its records are its own."""

from itertools import groupby

import torch
from rich.console import Console

from kernels.bench import RESULTS, Result, all_sites, append, measure, shown


def measure_kernels(device: torch.device, dtype: torch.dtype, console: Console) -> bool:
    """All sites, recorded operation by operation. Returns whether all ways agreed; one that does not is told and left out."""
    agreed = True
    for operation, sites in groupby(sorted(all_sites(), key=lambda site: site.operation), key=lambda site: site.operation):
        results: list[Result] = []
        for site in sites:
            try:
                results.append(measure(site, device, dtype, tiny=device.type != "cuda"))
            except ArithmeticError as exc:
                console.print(f"{operation}: {exc}")
                agreed = False
            if device.type == "cuda":
                torch.cuda.empty_cache()
        console.print(shown(results))
        if device.type == "cuda" and results:
            append(RESULTS, results, device, dtype)
    return agreed
