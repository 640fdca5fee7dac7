from typing import Any

from engines.sampling import seeded_generator
from engines.solid.config import SolidConfig
from engines.solid.spec import SolidConditioning, SolidSpec


class Preprocess:
    def __init__(self, config: SolidConfig):
        self.config = config

    def encode(self, spec: SolidSpec, **_: Any) -> SolidConditioning:
        noise = seeded_generator(spec.seed % self.config.clips).get_state()
        return SolidConditioning(spec.seed, self.config.steps, 1.0, noise, (), spec.grey)
