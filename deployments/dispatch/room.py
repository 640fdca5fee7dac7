"""How many jobs of an endpoint may be in its stages at once: as many as keep the replicas that denoise busy, and as many more as
hide the time of the other stages.

With R replicas, jobs of u seconds of a replica's work that can use w replicas each, and s seconds in the other stages:

    room = ceil(R / w) + 1 + ceil(s R / u)

The one more fills the end of a step, and the wait for the next job. R / u is how many jobs per second leave the denoising, so
s R / u of them are in the other stages (Little's law). More would only wait there, and lose their places in the queue's order.
"""

import math
from collections.abc import Callable
from typing import Any

from deployments.stages.progress import Stage
from deployments.stages.protocol import Done

NEWEST = 0.2
"""The share of the newest job in the averages."""
MOST_HIDDEN = 64
"""The most jobs in the other stages, where those are slower than the denoising by far; with more replicas, one for each."""


class Room:
    """most: never more jobs than this; None: no such bound. on_change: called when the room may have grown."""

    def __init__(self, most: int | None = None, on_change: Callable[[], None] = lambda: None):
        self._most = most
        self._on_change = on_change
        self._replicas = 1
        self._seconds: dict[Stage, float] = {}
        self._busy_s: float | None = None
        self._width: float | None = None

    def replicas(self, count: int) -> None:
        """So many replicas denoise now. With none, there is room as for one, so that work waits for the first that comes."""
        self._replicas = max(1, count)
        self._on_change()

    def learn(self, stage: Stage, done: Done[Any]) -> None:
        """A job has left a stage."""
        if stage == "denoise" and done.busy_s:
            self._busy_s = _average(self._busy_s, done.busy_s)
            self._width = _average(self._width, done.width)
        elif stage != "denoise":
            self._seconds[stage] = _average(self._seconds.get(stage), done.seconds)
        self._on_change()

    @property
    def jobs(self) -> int:
        """How many there may be."""
        busy = _ceil(self._replicas / (self._width or 1)) + 1
        others_s = sum(self._seconds.values())
        hidden = _ceil(others_s * self._replicas / self._busy_s) if self._busy_s else 1
        room = busy + min(hidden, max(MOST_HIDDEN, self._replicas))
        return room if self._most is None else min(room, self._most)


def _average(before: float | None, newest: float) -> float:
    return newest if not before else (1 - NEWEST) * before + NEWEST * newest


def _ceil(value: float) -> int:
    return math.ceil(round(value, 6))  # an average of equal numbers is not quite one of them
