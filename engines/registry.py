"""Model name -> its three stages, imported only when a process builds one. No torch at import."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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


_MODELS: dict[str, Callable[[], Model]] = {"animatediff-sparsectrl-lcm": _animatediff}


def load_model(name: str) -> Model:
    """The model's stages. Raises `KeyError` for a name that is not served."""
    return _MODELS[name]()
