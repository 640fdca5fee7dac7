"""What of the benchmark is asked for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """graph: our UNets as CUDA graphs, too. inductor: our compiled UNets, too. compile_theirs: diffusers', too.

    autotune: kernels are timed when compiling, minutes more.
    steps: of a job; None for the endpoint's default.
    unet_rounds, job_rounds: of timing; of a short job twice as many. compile_until: by `perf_counter`, none is begun later.
    """

    graph: bool
    inductor: bool
    compile_theirs: bool
    autotune: bool
    unet_rounds: int
    job_rounds: int
    steps: int | None = None
    compile_until: float = float("inf")
