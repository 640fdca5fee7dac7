"""Jobs that arrive over time: steady, in bursts, or along a day's curve; from a seed."""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

DAY_S = 86_400.0


@dataclass(frozen=True)
class Kind:
    """Jobs of one endpoint. stage_s: seconds of one replica's work in each stage.

    width: units of a denoising step that can run at the same time. steps: that follow each other.
    """

    name: str
    family: str
    stage_s: tuple[float, float, float]
    width: int = 1
    steps: int = 1
    drain_s: float = 30.0


CLIP = Kind("clips", "animatediff", (0.1, 0.38, 0.2), drain_s=5.0)
"""An AnimateDiff job: denoising and decoding as recorded on an H200 (`engines/results`), preprocessing assumed."""
SHORT_VIDEO = Kind("short videos", "controlnext", (2.5, 17.0, 2.5), width=2, steps=5)
"""A ControlNeXt job of 25 frames and 25 steps, as recorded on an H200 but for the poses. Five of its steps are one here."""
VIDEO = Kind("videos", "controlnext", (2.4, 120.0, 24.0), width=26, steps=5, drain_s=60.0)
"""A ControlNeXt job of 240 frames: 650 units of 0.19 s, as recorded; poses and decoding assumed. Five steps are one again."""


@dataclass(frozen=True)
class Trace:
    """kind: of all its jobs. at_s: when each arrives, ascending. length_s: until when new ones could.

    burst: when the rate rises and falls again; None: it has no burst. needs: denoisers that are all at work then.
    lowest, highest: replicas of a stage. coarse: each job's denoising is one unit, and units come in the order of jobs.
    """

    name: str
    kind: Kind
    at_s: tuple[float, ...]
    length_s: float
    highest: int
    lowest: int = 0
    burst: tuple[float, float] | None = None
    needs: float = 0.0
    coarse: bool = False

    @property
    def solo_s(self) -> float:
        """How long a job takes alone, on one warm replica a stage."""
        return sum(self.kind.stage_s)


def arrivals(rate: Callable[[float], float], most: float, length_s: float, seed: int) -> Iterator[float]:
    """A Poisson process whose rate changes, by thinning (Lewis and Shedler, 1979). rate: jobs a second, up to `most`."""
    chance, at = random.Random(seed), 0.0
    while (at := at + chance.expovariate(most)) < length_s:
        if chance.random() * most < rate(at):
            yield at


def burst(
    kind: Kind, busy: float, minutes: float, highest: int = 64, length_s: float = 2400.0, times: float = 8.0, seed: int = 1
) -> Trace:
    """A load that keeps `busy` denoisers at work, then `times` as much for some minutes, and the first again."""
    rate, begin = busy / kind.stage_s[1], length_s / 3
    end = begin + 60 * minutes
    at_s = arrivals(lambda at: rate * (times if begin <= at < end else 1), rate * times, length_s, seed)
    name = f"{times:g}x for {minutes:g} min, {kind.name}, {highest}{f', seed {seed}' * (seed != 1)}"
    return Trace(name, kind, tuple(at_s), length_s, highest, burst=(begin, end), needs=busy * times)


def coarse(trace: Trace) -> Trace:
    """The same jobs, each with one unit of denoising: for clusters that would take hours otherwise."""
    return replace(trace, kind=replace(trace.kind, width=1, steps=1), coarse=True)


def day(kind: Kind, busy: float, highest: int, seed: int = 1, length_s: float = DAY_S) -> Trace:
    """Nearly nothing at night, `busy` denoisers' work at the busiest hour, and an evening that is quieter than the afternoon."""
    rate = busy / kind.stage_s[1]

    def at_hour(at: float) -> float:
        turn = 2 * math.pi * at / length_s
        return rate * max(0.01, 0.5 - 0.42 * math.cos(turn) - 0.15 * math.sin(2 * turn))

    return Trace(f"a day, {kind.name}, {highest}", kind, tuple(arrivals(at_hour, rate * 1.2, length_s, seed)), length_s, highest)


def spikes(kind: Kind, jobs: int, every_s: float, highest: int, length_s: float = 7200.0) -> Trace:
    """`jobs` at once, again and again, and nothing in between: a studio's batches."""
    at_s = [begin + place * 0.01 for begin in range(60, int(length_s), int(every_s)) for place in range(jobs)]
    return Trace(
        f"{jobs} {kind.name} every {every_s / 60:.0f} min",
        kind,
        tuple(at_s),
        length_s,
        highest,
        burst=(60.0, 61.0),
        needs=float(jobs),
    )
