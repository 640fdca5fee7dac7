"""`make simulate`: the product's autoscaling against Serve's default one, on the same traces in the same simulated cluster.

    python -m tests.load.simulate [--short] [--save]

What is simulated is the cluster: replicas, their starts (a GPU stage is ready after 18 to 42 s), failures (every six hours) and
stragglers (1 % of the units take four times as long). The policy, its load, Serve's own code around it, the scheduling of units
and the dispatcher's room are the real ones; only with thousands of jobs at work (coarse) is a job's denoising one unit and its
place that of its turn. Serve's default is given every job as a request at its stage's handle. The first trace is run from several
seeds, and its worst result counts.

In 2x: jobs that took no longer than twice their time alone on warm replicas; in burst: of those that arrived in it. Wait: seconds
until denoising began. Risen, scaled: seconds from the burst's begin until the denoisers' target rose, and until it was what the
burst needs. Goodput: seconds of work of finished jobs for every second that a replica was held, all stages and starts included.
Back: the most changes within five minutes that took back one of the five minutes before. ms: CPU time of the longest decision.
Writes: what the database gets a second at most: each job's submission, claim and end, and for every job at work a line of
progress a second and three heartbeats in ten. One PostgreSQL on two cores took 2,700 claims or 3,200 submissions a second
(`queue.md`).
"""

import argparse
import logging
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, quantiles
from typing import Any

from tests.load.report import Report, table
from tests.load.simulate.autoscalers import Ours, ServeDefault
from tests.load.simulate.cluster import DENOISE, Change, Cluster
from tests.load.simulate.limits import UNIT_S, unit_cpu_s
from tests.load.simulate.trace import CLIP, SHORT_VIDEO, VIDEO, Trace, burst, coarse, day, spikes

SEEDS = (1, 2, 3)
"""Of the trace that has targets."""
DECISION_S, PASS_S, POINTS, FLAP_S = 5.0, 0.1, 25.0, 300.0
"""The targets: from a burst's begin to the first rise; for one decision; jobs within twice their solo time; see `reversals`."""


COLUMNS = (
    *("autoscaler", "in 2x", "in burst", "wait", "p95", "risen", "scaled"),
    *("goodput", "most", "changes", "back", "ms", "writes"),
)


@dataclass(frozen=True)
class Outcome:
    """What became of a trace; see the module. Times in seconds; waits, changes and `most` are of the denoisers."""

    trace: str
    autoscaler: str
    jobs: int
    goodput: float
    within_2x: float
    in_burst: float | None
    wait_mean_s: float
    wait_p95_s: float
    decision_s: float | None
    scaled_s: float | None
    most: int
    changes: int
    reversals: int
    decided_s: float
    writes: float


def reversals(changes: Sequence[Change]) -> int:
    """The most changes within any five minutes that took back one made less than five minutes before."""
    ways = [(each.at, each.after > each.before) for each in changes if each.stage == DENOISE]
    back = [later for (sooner, was), (later, way) in pairwise(ways) if way != was and later - sooner < FLAP_S]
    return max((sum(begin <= at < begin + FLAP_S for at in back) for begin in back), default=0)


def writes_of(cluster: Cluster) -> float:
    """Writes a second at the busiest ten seconds of arrivals, beside as many jobs at work as there were at any time."""
    at_s = cluster.trace.at_s
    arrivals = max(bisect_left(at_s, at + 10) - place for place, at in enumerate(at_s)) / 10
    return 3 * arrivals + 1.3 * cluster.most_working


def outcome(trace: Trace, autoscaler: Any, seed: int = 1) -> Outcome:
    """Runs a trace."""
    cluster = Cluster(trace, autoscaler, seed=seed).run()
    solo_s = trace.solo_s
    good = [took_s <= 2 * solo_s for _, took_s in cluster.latencies_s]
    begin, end = trace.burst or (0.0, 0.0)
    in_burst = [took_s <= 2 * solo_s for at, took_s in cluster.latencies_s if begin <= at < end]
    changes = [each for each in cluster.changes if each.stage == DENOISE]
    risen = next((each.at for each in changes if each.at >= begin and each.after > each.before), None) if trace.burst else None
    enough = next((each.at for each in changes if each.at >= begin and each.after >= trace.needs), None) if trace.burst else None
    return Outcome(
        trace.name,
        autoscaler.name,
        len(good),
        len(good) * solo_s / sum(pool.held_s for pool in cluster.pools),
        mean(good),
        mean(in_burst) if in_burst else None,
        mean(cluster.waits_s),
        quantiles(cluster.waits_s, n=20)[-1],
        None if risen is None else risen - begin,
        None if enough is None else enough - begin,
        max(each.after for each in changes),
        len(changes),
        reversals(changes),
        autoscaler.slowest_s,
        writes_of(cluster),
    )


def traces(short: bool) -> Iterator[tuple[Trace, float]]:
    """The traces, and how often the autoscalers are called in each, in seconds. Those with a seed in `SEEDS` have targets."""
    for seed in SEEDS:
        yield burst(SHORT_VIDEO, busy=4, minutes=5, seed=seed), 1.0
    if short:
        return
    yield burst(SHORT_VIDEO, busy=4, minutes=10), 1.0
    yield burst(CLIP, busy=0.1, minutes=5, highest=1), 1.0
    yield burst(CLIP, busy=2, minutes=5), 1.0
    yield burst(VIDEO, busy=4, minutes=10), 1.0
    yield spikes(VIDEO, jobs=40, every_s=1800, highest=64), 1.0
    yield coarse(day(VIDEO, busy=100, highest=200)), 5.0
    long_s = 2700  # the burst comes when what Serve's default has started at first is gone
    yield coarse(burst(SHORT_VIDEO, busy=250, minutes=5, highest=4000, length_s=long_s)), 1.0


def autoscalers(trace: Trace, every_s: float) -> Iterator[Callable[[], Any]]:
    """Ours, Serve's with its defaults, and Serve's with delays that somebody has chosen well."""
    yield lambda: Ours(trace.kind, trace.highest, every_s)
    yield lambda: ServeDefault("Serve's default", trace.highest, every_s)
    tuned = {"upscale_delay_s": 0.0, "look_back_period_s": 5.0, "downscale_delay_s": 300.0}
    yield lambda: ServeDefault("Serve's, tuned", trace.highest, every_s, **tuned)


def sampler_limits() -> Any:
    """Units a second that one sampler can schedule, and that the replicas could run."""
    shown = table(
        "One sampler: units of 0.2 s, scheduling alone, without the calls", "replicas", "us a unit", "possible", "needed"
    )
    for replicas in (1, 8, 64, 256, 1024):
        took_s = unit_cpu_s(replicas)
        shown.add_row(str(replicas), f"{took_s * 1e6:.0f}", f"{1 / took_s:.0f}", f"{replicas / UNIT_S:.0f}")
    return shown


def misses(ours: Outcome, default: Outcome, *, judged: bool) -> list[str]:
    """Which targets are missed. judged: by this trace, all of them."""
    found = []
    if judged and (ours.decision_s is None or ours.decision_s > DECISION_S):
        found.append(f"{ours.trace}: the first rise came after {ours.decision_s} s, not {DECISION_S} s")
    if judged and 100 * (ours.within_2x - default.within_2x) < POINTS:
        found.append(f"{ours.trace}: not {POINTS} points more jobs within twice their solo time than Serve's default")
    if ours.reversals > 1:
        found.append(f"{ours.trace}: {ours.reversals} reversals in five minutes")
    if ours.decided_s > PASS_S:
        found.append(f"{ours.trace}: a decision took {ours.decided_s * 1000:.0f} ms, not {PASS_S * 1000:.0f} ms")
    return found


def cells(each: Outcome, highest: int) -> list[str]:
    """A row of the table."""
    lags = ["" if lag_s is None else f"{lag_s:.0f}" for lag_s in (each.decision_s, each.scaled_s)]
    shares = [f"{each.within_2x:.1%}", "" if each.in_burst is None else f"{each.in_burst:.1%}"]
    counts = [f"{each.most} of {highest}", str(each.changes), str(each.reversals)]
    costs = [f"{each.decided_s * 1000:.1f}", f"{each.writes:.0f}"]
    waits = [f"{each.wait_mean_s:.1f}", f"{each.wait_p95_s:.1f}"]
    return [each.autoscaler, *shares, *waits, *lags, f"{each.goodput:.2f}", *counts, *costs]


def main() -> int:
    """Runs the traces; returns the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--short", action="store_true", help="only the trace with the targets")
    parser.add_argument("--save", action="store_true", help="writes results/simulate.md")
    options = parser.parse_args()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    report = Report("simulate", "Autoscaling in a simulated cluster", __doc__, "`make simulate`")
    faults: list[str] = []
    for place, (trace, every_s) in enumerate(traces(options.short)):
        outcomes = [outcome(trace, make()) for make in autoscalers(trace, every_s)]
        shown = table(f"{trace.name}{', coarse' * trace.coarse}: {len(trace.at_s)} jobs, {trace.solo_s:.0f} s alone", *COLUMNS)
        for each in outcomes:
            shown.add_row(*cells(each, trace.highest))
        report.add(shown)
        faults += misses(outcomes[0], outcomes[1], judged=place < len(SEEDS))
    if not options.short:
        report.add(sampler_limits())
    return report.conclude(faults, save=options.save)


if __name__ == "__main__":
    sys.exit(main())
