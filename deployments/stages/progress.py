"""How far a stage of a job is, for people and for programs, and how long the rest will take at its pace so far."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from engines.spec import Progress

Stage = Literal["preprocess", "denoise", "decode"]


@dataclass(frozen=True)
class StageProgress:
    """Where a stage is. eta_s: seconds until it ends; None until that is known."""

    stage: Stage
    at: Progress
    eta_s: float | None = None

    @property
    def message(self) -> str:
        """E.g. "denoise: step 3/25, window 5/13, 12 s left"."""
        parts = [f"{level.unit} {level.done}/{level.total}" for level in _levels(self.at)]
        if self.eta_s is not None and self.at.fraction < 1:
            parts.append(f"{_in_words(self.eta_s)} left")
        return f"{self.stage}: {', '.join(parts)}"

    def fields(self) -> dict[str, Any]:
        """The same as JSON: stage, fraction in [0, 1], eta_s, and done and total of each unit under its name."""
        units = {level.unit: {"done": level.done, "total": level.total} for level in _levels(self.at)}
        eta_s = None if self.eta_s is None else round(self.eta_s, 1)
        return {"stage": self.stage, "fraction": round(self.at.fraction, 4), "eta_s": eta_s, **units}


class Estimate:
    """Estimates when a stage will end, from the fractions of its work that it reports. clock: in seconds.

    The pace is measured from the first report on: it includes neither the loading of files nor steps before a checkpoint.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._first: tuple[float, float] | None = None  # when, fraction

    def eta_s(self, fraction: float) -> float | None:
        """Seconds until the work is done; None until some of it has been done."""
        now = self._clock()
        began_at, began_with = self._first = self._first or (now, fraction)
        if fraction <= began_with:
            return None
        return (now - began_at) / (fraction - began_with) * (1 - fraction)


def _levels(progress: Progress) -> Iterator[Progress]:
    """The unit of work, then the one within it, and so on."""
    level: Progress | None = progress
    while level is not None:
        yield level
        level = level.within


def _in_words(seconds: float) -> str:
    whole = math.ceil(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
