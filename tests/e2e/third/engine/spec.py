from dataclasses import dataclass

from engines.spec import Conditioning, RenderSpec


@dataclass(frozen=True)
class SolidSpec(RenderSpec):
    grey: int


@dataclass(frozen=True)
class SolidConditioning(Conditioning):
    grey: int
