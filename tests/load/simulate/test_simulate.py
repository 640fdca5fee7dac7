"""The simulated cluster keeps its own laws, and the autoscaling meets its targets in a short burst."""

import logging
from collections.abc import Iterator

import pytest

from tests.load.simulate.__main__ import misses, outcome, reversals
from tests.load.simulate.autoscalers import Ours, ServeDefault
from tests.load.simulate.cluster import Change, Cluster, Weather
from tests.load.simulate.trace import SHORT_VIDEO, VIDEO, Kind, Trace, burst

CALM = Weather(ready_s=(0.0, 0.0, 0.0), failures_s=1e12, stragglers=0.0)


class Fixed:
    """So many replicas of each stage, whatever comes."""

    every_s = 10.0
    name = "fixed"
    slowest_s = 0.0

    def __init__(self, *counts: int):
        self.counts = list(counts)

    def targets(self, now: float, cluster: Cluster) -> list[int]:
        return self.counts


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    level = logging.getLogger("ray.serve").level
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    yield
    logging.getLogger("ray.serve").setLevel(level)


def test_a_job_alone_takes_its_own_time_and_a_wide_one_is_shared():
    alone = Kind("alone", "controlnext", (1.0, 26.0, 2.0))
    wide = Kind("wide", "controlnext", (1.0, 26.0, 2.0), width=13, steps=2)
    for kind, replicas, expected in ((alone, 1, 29.0), (alone, 4, 29.0), (wide, 1, 29.0), (wide, 13, 5.0), (wide, 4, 11.0)):
        done = Cluster(Trace("one", kind, (5.0,), 10.0, 20), Fixed(1, replicas, 1), CALM).run()
        assert done.latencies_s == [(5.0, pytest.approx(expected))]
        assert done.pools[1].work_s == pytest.approx(26)


def test_no_job_is_lost_when_replicas_fail_and_leave():
    trace = burst(SHORT_VIDEO, busy=3, minutes=1, highest=12, length_s=300)
    stormy = Weather(failures_s=60.0, stragglers=0.2)
    done = Cluster(trace, Ours(trace.kind, 12, idle_s=20), stormy).run()
    assert len(done.latencies_s) == len(trace.at_s)
    assert done.pools[1].work_s == pytest.approx(17 * len(trace.at_s))
    assert done.pools[1].held_s > done.pools[1].work_s


def test_a_reversal_takes_back_a_change_of_the_last_five_minutes():
    ways = [
        Change(at, 1, before, after) for at, before, after in ((0, 1, 4), (299, 4, 3), (310, 3, 5), (700, 5, 1), (1001, 1, 2))
    ]
    assert reversals(ways) == 2
    assert reversals(ways[2:]) == 0


def test_a_burst_is_met_at_once_and_many_more_jobs_are_in_time_than_with_serves_default():
    trace = burst(SHORT_VIDEO, busy=4, minutes=5, length_s=1200)
    ours = outcome(trace, Ours(trace.kind, trace.highest))
    default = outcome(trace, ServeDefault("Serve's default", trace.highest))
    assert not misses(ours, default, judged=True)
    assert ours.in_burst is not None
    assert ours.in_burst >= 0.95
    assert ours.goodput > default.goodput


def test_units_that_are_shared_need_no_more_replicas():
    trace = burst(VIDEO, busy=2, minutes=5, highest=32, length_s=1200)
    ours = outcome(trace, Ours(trace.kind, 32))
    assert ours.within_2x == 1.0
    assert ours.reversals <= 1
