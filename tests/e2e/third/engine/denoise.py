from typing import Any

import torch

from engines.solid.config import SolidConfig
from engines.solid.spec import SolidConditioning
from engines.spec import CallEngines, Latents


class Denoise:
    engines: CallEngines = ()

    def __init__(self, config: SolidConfig):
        self.frames = config.frames

    def sample(self, conditioning: SolidConditioning, **_: Any) -> Latents:
        return Latents(torch.full((1, 1, self.frames, 8, 8), float(conditioning.grey)), conditioning.seed)
