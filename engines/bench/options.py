"""The options of the benchmark."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """graph: also measure our UNets as CUDA graphs. inductor: also our compiled UNets. compile_theirs: also diffusers'.

    autotune: compilers time kernels to choose among them, which takes minutes more.
    steps: of a job; None for the endpoint's default.
    unet_rounds, job_rounds: rounds of timing; AnimateDiff's short jobs have twice as many. compile_until: a time of
    `perf_counter` after which no compiling is started.
    """

    graph: bool
    inductor: bool
    compile_theirs: bool
    autotune: bool
    unet_rounds: int
    job_rounds: int
    steps: int | None = None
    compile_until: float = float("inf")
