from typing import Any

from engines.sampling import seeded_generator
from engines.solid.config import SolidConfig
from engines.solid.spec import SolidConditioning, SolidSpec


class Preprocess:
    def __init__(self, config: SolidConfig):
        pass

    def encode(self, spec: SolidSpec, **_: Any) -> SolidConditioning:
        return SolidConditioning(spec.seed, 1, 1.0, seeded_generator(spec.seed).get_state(), (), spec.grey)
