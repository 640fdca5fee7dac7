import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from engines.solid.config import SolidConfig
from engines.solid.spec import SolidConditioning
from engines.spec import CallEngines
from engines.units import Report, Unit, UnitOutput


@dataclass(frozen=True, kw_only=True)
class CountedUnit(Unit):
    """Unit `n` of a step. latents: (1, 1, F, 8, 8)."""

    step: int
    n: int
    latents: torch.Tensor


class Denoise:
    engines: CallEngines = ()

    def __init__(self, config: SolidConfig):
        self.unit_s = config.unit_s
        self.record = os.open(config.record, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def begin(self, conditioning: SolidConditioning) -> "Request":
        return Request(self, conditioning.seed)


class Request:
    def __init__(self, stage: Denoise, seed: int):
        self.stage, self.seed = stage, seed

    def run(self, unit: CountedUnit, tell: Callable[[Report], None], should_stop: Any) -> UnitOutput:
        os.write(
            self.stage.record, f"{self.seed} {unit.step} {unit.n}\n".encode()
        )  # one write: lines of many processes stay whole
        time.sleep(self.stage.unit_s)
        return UnitOutput((unit.latents * (unit.n + 2) + unit.step).remainder(251.0), "counted")
