"""A model whose units of work only sleep: what is left of the time is the service's own."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from engines.config import ModelConfig
from engines.spec import CallEngines, Conditioning
from engines.units import Report, Unit, UnitOutput


@dataclass(frozen=True)
class SleepingConditioning(Conditioning):
    """units: of a step. unit_s: how long each takes. shape: of each one's input and output."""

    units: int
    unit_s: float
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SleepingUnit(Unit):
    """latents: as large as a real unit's."""

    latents: torch.Tensor


class Denoise:
    """See `DenoiseStage`."""

    engines: CallEngines = ()

    def __init__(self, config: ModelConfig):
        pass

    def begin(self, conditioning: SleepingConditioning) -> "Request":
        return Request(conditioning.unit_s)


class Request:
    def __init__(self, unit_s: float):
        self.unit_s = unit_s

    def run(self, unit: SleepingUnit, tell: Callable[[Report], None], should_stop: Any) -> UnitOutput:
        time.sleep(self.unit_s)
        return UnitOutput(unit.latents.clone(), "asleep")
