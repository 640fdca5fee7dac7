"""Model name -> its three stages, imported only when a process builds one. No torch at import."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, overload

from engines.spec import DecodeStage, DenoiseStage, PreprocessStage


@dataclass(frozen=True)
class Model:
    """How to build the stages of a model from its config."""

    preprocess: Callable[[Any], PreprocessStage]
    denoise: Callable[[Any], DenoiseStage]
    decode: Callable[[Any], DecodeStage]


def _animatediff() -> Model:
    from engines.animatediff.decode import Decode
    from engines.animatediff.denoise import Denoise
    from engines.animatediff.preprocess import Preprocess

    return Model(Preprocess, Denoise, Decode)


def _controlnext() -> Model:
    from engines.controlnext.decode import Decode
    from engines.controlnext.denoise import Denoise
    from engines.controlnext.preprocess import Preprocess

    return Model(Preprocess, Denoise, Decode)


_MODELS: dict[str, Callable[[], Model]] = {"animatediff-sparsectrl-lcm": _animatediff, "controlnext": _controlnext}


@overload
def build_stage(model: str, stage: Literal["preprocess"], config: Any) -> PreprocessStage: ...
@overload
def build_stage(model: str, stage: Literal["denoise"], config: Any) -> DenoiseStage: ...
@overload
def build_stage(model: str, stage: Literal["decode"], config: Any) -> DecodeStage: ...
def build_stage(model: str, stage: str, config: Any) -> Any:
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

    from engines.arithmetic import exact_arithmetic

    exact_arithmetic()
    # Ray sets one thread for a process with fewer than two CPUs, which halves the speed on a CPU
    torch.set_num_threads(config.threads or (cores if config.device == "cpu" else 1))
    return getattr(_MODELS[model](), stage)(config)
