import time
from collections.abc import Callable
from typing import Any

import torch

from engines.solid.config import SolidConfig
from engines.solid.spec import SolidConditioning
from engines.spec import CallEngines
from engines.units import Report, Steps, UnitOutput


class Denoise:
    engines: CallEngines = ()

    def __init__(self, config: SolidConfig):
        self.config = config

    def begin(self, conditioning: SolidConditioning) -> "Request":
        return Request(self.config, conditioning.grey)


class Request:
    def __init__(self, config: SolidConfig, grey: int):
        self.config, self.grey = config, grey

    def run(self, unit: Steps, tell: Callable[[Report], None], should_stop: Any) -> UnitOutput:
        time.sleep(self.config.denoise_s)
        return UnitOutput(torch.full((1, 1, self.config.frames, 8, 8), float(self.grey)), "eager")
