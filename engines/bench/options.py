"""What of the benchmark is asked for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """inductor: our compiled UNets too. compile_theirs: diffusers' too. autotune: kernels are timed when compiling, minutes more.

    unet_rounds, job_rounds: of timing; of a short job twice as many. compile_until: by `perf_counter`, none is begun later.
    """

    inductor: bool
    compile_theirs: bool
    autotune: bool
    unet_rounds: int
    job_rounds: int
    compile_until: float = float("inf")
