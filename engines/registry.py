"""Model name -> its three stages and its demo, imported only when a process needs them. No torch at import."""

import os
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from engines.config import ModelConfig
from engines.demo.shipped import shipped
from engines.spec import DecodeStage, PreprocessStage

if TYPE_CHECKING:
    from engines.units import DenoiseStage, Sampler

_MODELS = {
    "animatediff-sparsectrl-lcm": "engines.animatediff",
    "controlnext": "engines.controlnext",
}
"""Model -> its folder, with a module for each stage (`preprocess.py` holds `Preprocess`, and so on; `sampler.py` drives
`denoise.py`). A model with checkpoints has
`demo_weights.py`, and one that `reelray demo` can render `demo_input.py`."""


@overload
def build_stage(model: str, stage: Literal["preprocess"], config: ModelConfig) -> PreprocessStage: ...
@overload
def build_stage(model: str, stage: Literal["sampler"], config: ModelConfig) -> "Sampler": ...
@overload
def build_stage(model: str, stage: Literal["denoise"], config: ModelConfig) -> "DenoiseStage": ...
@overload
def build_stage(model: str, stage: Literal["decode"], config: ModelConfig) -> DecodeStage: ...
def build_stage(model: str, stage: str, config: ModelConfig) -> Any:
    """A loaded stage. config: the model's, e.g. `AnimateDiffConfig`; its `threads` become this process's.

    Raises `KeyError` for a model that is not served, `WeightsError` for checkpoints that do not fit.
    """
    cores = os.cpu_count() or 1
    if config.device == "cpu":
        # OpenMP's threads spin while they wait, and keep cores from threads with work: two processes of two threads on two cores
        # took 0.8 to 1.8 s a job, at times 22. With a short spin they take 0.3 s, and a process alone takes no longer than before
        # (0.19 s). Read when torch loads.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        # Memory for tensors above 32 MB is mapped and released at every use. Huge pages make that cost far fewer page faults:
        # decoding 8 frames of 512x288 took 5.7 s instead of 8.1.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if config.engine.folder is not None:
        # keeps inductor's compiled code beside the plans for the next process; by default it is in a temporary folder
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(config.engine.folder / "inductor"))
    import torch

    from engines.diffusion.arithmetic import exact_arithmetic

    exact_arithmetic()
    if stage != "sampler":  # which computes little
        # Ray sets one thread for a process with fewer than two CPUs, which halves the speed on a CPU
        torch.set_num_threads(config.threads or (cores if config.device == "cpu" else 1))
    return getattr(import_module(f"{_MODELS[model]}.{stage}"), stage.title())(config)


def write_demo_weights(model: str, folder: Path) -> None:
    """Writes the model's demo checkpoint, if it has one: the package's trained one, or else random numbers in the same layout."""
    if (trained := shipped(_MODELS[model].rpartition(".")[2])) is not None:
        import_module("engines.demo.checkpoint").copy_once(trained, folder)
    elif find_spec(f"{_MODELS[model]}.demo_weights"):
        import_module(f"{_MODELS[model]}.demo_weights").write_demo_weights(folder)


def demo_input(model: str) -> dict[str, Any] | None:
    """An input to try the model with, in which a file is its content type and its bytes; None if the model has none."""
    if not find_spec(f"{_MODELS[model]}.demo_input"):
        return None
    made: dict[str, Any] = import_module(f"{_MODELS[model]}.demo_input").demo_input()
    return made
