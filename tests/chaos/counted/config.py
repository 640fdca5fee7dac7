from dataclasses import dataclass

from engines.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class SolidConfig(ModelConfig):
    """units: of each of a job's steps. unit_s: how long one takes. record: the file that counts them.

    clips: so many different ones there are; jobs whose seeds differ by a multiple of it have one clip. frames: of each.
    """

    frames: int = 5
    steps: int = 4
    units: int = 6
    unit_s: float = 0.02
    record: str = ""
    clips: int = 10
