"""The autoscaling policy with a made-up clock and backlog, and within Serve's own code around a policy."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ray.serve._private.common import DeploymentID
from ray.serve.autoscaling_policy import _apply_app_level_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from deployments.dispatch.autoscaling import STALE_S, BacklogPolicy, needed
from deployments.dispatch.backlog import Reading, StageLoad

IDLE = StageLoad()
NAMES = ("clips-preprocess", "clips-denoise", "clips-decode")
DENOISE = NAMES[1]


@dataclass(frozen=True)
class Clips:
    id: str = "fal-ai/clips"
    family: str = "clips"
    unit_times: tuple[float, float, float] = (1, 1, 1)
    drain_s: float = 30
    idle_s: float = 300


CLIPS = Clips()


@dataclass
class FakeReader:
    reading: Reading | None = None
    decisions: Mapping[str, Any] = field(default_factory=dict)
    starts: int = 0

    def start(self) -> None:
        self.starts += 1

    def stop(self) -> None:
        pass


@dataclass
class Cluster:
    """Three deployments whose replicas are what the policy wants, `ready_s` after it wants them."""

    lowest: int = 0
    highest: int = 100
    ready_s: float = 0
    now: float = 1000.0
    reader: FakeReader = field(default_factory=FakeReader)

    def __post_init__(self) -> None:
        self.policy = BacklogPolicy(self.reader, lambda: self.now)  # type: ignore[arg-type]
        self.targets = dict.fromkeys(NAMES, self.lowest)
        self.replicas = dict(self.targets)
        self.rising: list[tuple[float, str, int]] = []

    def contexts(self, requests: float = 0) -> dict[DeploymentID, AutoscalingContext]:
        config = AutoscalingConfig(min_replicas=self.lowest, max_replicas=self.highest, upscale_delay_s=30, downscale_delay_s=0)
        return {
            DeploymentID(name, "app"): AutoscalingContext(
                deployment_id=DeploymentID(name, "app"),
                deployment_name=name,
                app_name="app",
                current_num_replicas=self.replicas[name],
                target_num_replicas=self.targets[name],
                running_replicas=[],
                total_num_requests=requests,
                total_queued_requests=requests,
                aggregated_metrics={},
                raw_metrics={},
                capacity_adjusted_min_replicas=self.lowest,
                capacity_adjusted_max_replicas=self.highest,
                policy_state={},
                last_scale_up_time=None,
                last_scale_down_time=None,
                current_time=self.now,
                config=config,
            )
            for name in NAMES
        }

    def tick(self, denoise: StageLoad, after_s: float = 1, others: StageLoad = IDLE) -> int:
        """The target of denoising `after_s` later, under this load."""
        self.now += after_s
        self.reader.reading = Reading(self.now, {CLIPS: (others, denoise, others)})
        answer, state = self.policy(self.contexts())
        assert state is None
        for key, target in answer.items():
            if target > self.targets[key.name]:
                self.rising.append((self.now + self.ready_s, key.name, target))
            self.targets[key.name] = target
        for at, name, target in self.rising:
            if at <= self.now:
                self.replicas[name] = max(self.replicas[name], target)
        self.rising = [each for each in self.rising if each[0] > self.now]
        self.replicas = {name: min(count, self.targets[name]) for name, count in self.replicas.items()}
        return self.targets[DENOISE]


def load(waiting_s: float = 0, busy: float = 0, parallel: float = 1000, **more: float) -> StageLoad:
    return StageLoad(waiting_s=waiting_s, busy=busy, parallel=parallel, **more)


# What is needed.


@pytest.mark.parametrize(
    ("work", "replicas", "target", "need"),
    [
        (load(), 3, 3, 0),
        (load(0.001), 0, 0, 1),
        (load(300), 0, 0, 10),  # 300 s in 30 s
        (load(300, parallel=4), 0, 0, 4),  # no more than there are calls to make
        (load(300, busy=1), 1, 1, 10),  # one at work, and 270 s remain after its 30
        (load(20, busy=1), 1, 1, 1),  # a second would be ready when all is done
        (load(0, busy=5, running_s=500), 5, 5, 5),
        (load(60, busy=5, running_s=150), 5, 5, 7),  # the five are busy until then
        (load(60, busy=5, running_s=0), 5, 5, 5),
        (load(90, busy=1), 1, 3, 3),  # the two that are coming are enough, and are needed
        (load(90, busy=1), 1, 9, 3),  # eight would be too many
        (load(0, busy=1, arriving=4), 1, 1, 4),  # more arrives than one works off
        (load(900, busy=26), 1, 1, 30),
    ],
)
def test_needs_follow_the_work_that_would_still_wait(work: StageLoad, replicas: int, target: int, need: int):
    assert needed(work, replicas, target, ready_s=30, drain_s=30) == need


numbers = st.floats(0, 1e6)
work = st.builds(StageLoad, numbers, numbers, numbers, numbers, numbers, numbers)


@given(work, st.integers(0, 4000), st.integers(0, 4000), st.floats(0, 1000), st.floats(0.1, 1000), st.floats(1, 1e5))
@settings(max_examples=200, deadline=None)
def test_more_work_never_needs_fewer(one: StageLoad, replicas: int, target: int, ready_s: float, drain_s: float, more: float):
    need = needed(one, replicas, target, ready_s, drain_s)
    assert 0 <= need <= max(1, math.ceil(one.parallel))
    assert needed(replace(one, waiting_s=one.waiting_s + more), replicas, target, ready_s, drain_s) >= need


# When the target changes.


def test_a_rise_is_made_with_the_first_reading():
    cluster = Cluster()
    assert cluster.tick(load(300)) == 10
    assert cluster.tick(load(600)) == 20


def test_the_target_falls_when_fewer_were_enough_for_long():
    cluster = Cluster()
    cluster.tick(load(300))
    assert {cluster.tick(load(0, busy=2), 10) for _ in range(30)} == {10}
    assert cluster.tick(load(0, busy=2), 10) == 2
    assert {cluster.tick(IDLE, 10) for _ in range(30)} == {2}
    assert cluster.tick(IDLE, 10) == 0
    assert cluster.tick(load(0.5)) == 1


def test_what_was_there_before_the_policy_began_is_kept_as_long():
    cluster = Cluster()
    cluster.targets[DENOISE] = cluster.replicas[DENOISE] = 7
    assert {cluster.tick(IDLE, 10) for _ in range(30)} == {7}
    cluster.tick(IDLE, 10)
    assert cluster.tick(IDLE, 10) == 0


steps = st.tuples(st.floats(0.1, 400), st.one_of(st.just(IDLE), work))
bursts = [(1.0, load(300)), (301.0, IDLE), (0.1, IDLE), (0.1, load(900)), (299.0, IDLE), (2.0, IDLE)]


@given(st.lists(steps, min_size=1, max_size=60), st.integers(0, 3), st.integers(3, 50))
@example(bursts, 0, 50)
@settings(max_examples=150, deadline=None)
def test_bounds_hold_and_nothing_flaps(trace: Sequence[tuple[float, StageLoad]], lowest: int, highest: int):
    """A reversal takes back a change that was made less than 5 minutes before."""
    cluster = Cluster(lowest, highest)
    changes: list[tuple[float, int]] = []
    target = lowest
    for after_s, one in trace:
        before, target = target, cluster.tick(one, after_s)
        assert lowest <= target <= highest
        need = needed(one, 0, 0, 30, 30) if one.waiting_s else 0
        assert not need or target >= 1
        if target != before:
            changes.append((cluster.now, 1 if target > before else -1))
    pairs = pairwise(changes)
    reversals = [(later, way) for (sooner, was), (later, way) in pairs if way != was and later - sooner < 300]
    assert all(way > 0 for _, way in reversals)  # no rise is taken back
    assert all(later - sooner >= 300 for (sooner, _), (later, _) in pairwise(reversals))


def test_a_stage_is_no_larger_than_the_slowest_can_feed():
    cluster = Cluster(highest=8)
    slow, quick = load(6000, job_s=60), load(200, job_s=2)  # a hundred jobs
    assert cluster.tick(slow, others=quick) == 8
    assert cluster.targets[NAMES[2]] == 1  # 8 replicas of 60 s a job feed a quarter of one


def test_a_stage_is_sized_by_what_the_slower_one_before_it_feeds_and_by_its_own_queue():
    cluster = Cluster()
    slow, quick = load(600, job_s=60), load(300, job_s=6)
    assert cluster.tick(slow, others=quick) == 20
    assert (cluster.targets[NAMES[0]], cluster.targets[NAMES[2]]) == (10, 3)  # a third of a job a second, 6 s each, and a quarter
    cluster.tick(slow, others=replace(quick, here_s=150))
    assert cluster.targets[NAMES[2]] == 8


def test_replicas_that_are_starting_stay_needed_however_long_they_take():
    cluster = Cluster(ready_s=600)
    assert {cluster.tick(load(300), 10) for _ in range(50)} == {10}


def test_replicas_that_are_starting_count_with_what_they_will_do_before_new_ones_are_ready():
    cluster = Cluster(ready_s=60)
    assert (cluster.tick(load(300)), cluster.tick(load(300))) == (10, 10)
    assert cluster.tick(load(900), 15) == 25  # the ten are 15 s ahead of those: 150 s of the work


def test_how_long_replicas_take_to_be_ready_is_measured_and_used():
    cluster = Cluster(ready_s=90)
    for _ in range(200):
        cluster.tick(load(300))
    assert cluster.reader.decisions[DENOISE].ready_s == pytest.approx(90, abs=2)
    alone = Cluster()
    alone.policy = cluster.policy
    assert needed(load(80, busy=1), 1, 1, 90, 30) == 1
    assert needed(load(80, busy=1), 1, 1, 30, 30) == 3


# What must not happen.


@pytest.mark.parametrize("nonsense", [math.nan, math.inf, -1.0, "many", None])
def test_a_load_that_makes_no_sense_holds_the_targets_of_its_endpoint(nonsense: Any):
    cluster = Cluster()
    cluster.tick(load(300))
    for fields in ({"waiting_s": nonsense}, {"busy": nonsense}, {"parallel": nonsense}):
        assert cluster.tick(replace(load(900), **fields)) == 10
    other, name = Clips("fal-ai/others", "others"), "others-denoise"
    contexts = cluster.contexts()
    key, context = DeploymentID(name, "app"), contexts[DeploymentID(DENOISE, "app")]
    context.deployment_name = name
    bad, good = (IDLE, load(math.nan), IDLE), (IDLE, load(9000), IDLE)
    cluster.reader.reading = Reading(cluster.now, {CLIPS: bad, other: good})
    assert cluster.policy({**cluster.contexts(), key: context}) == ({key: 100}, None)


def test_without_a_fresh_reading_targets_hold_and_a_fall_is_put_off():
    cluster = Cluster()
    assert cluster.policy(cluster.contexts()) == ({}, None)  # nothing was read yet
    cluster.tick(load(300))
    for _ in range(30):
        cluster.tick(IDLE, 9)
    for wrong in (None, Reading(cluster.now - STALE_S - 1, {CLIPS: (IDLE,) * 3}), Reading(cluster.now + 1, {CLIPS: (IDLE,) * 3})):
        cluster.reader.reading = wrong
        assert cluster.policy(cluster.contexts()) == ({}, None)
    assert {cluster.tick(IDLE, 10) for _ in range(30)} == {10}
    assert cluster.tick(IDLE, 10) == 0


@pytest.mark.parametrize("contexts", [None, {}, {1: None}, {1: object()}, [1]])
def test_contexts_that_make_no_sense_change_nothing(contexts: Any):
    cluster = Cluster()
    cluster.reader.reading = Reading(cluster.now, {CLIPS: (IDLE, load(300), IDLE)})
    assert cluster.policy(contexts) == ({}, None)


def test_a_reader_that_cannot_start_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    cluster = Cluster()

    def fail() -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(cluster.reader, "start", fail)
    assert cluster.policy(cluster.contexts()) == ({}, None)


# Within Serve.


def test_serve_lets_a_queue_that_grows_during_a_cold_start_raise_the_target():
    """A waiting call makes Serve want one replica for a deployment without any, whatever the policy says."""
    cluster = Cluster()
    wrapped = _apply_app_level_autoscaling_config(cluster.policy)
    for waiting_s, expected in ((10, 1), (300, 10), (900, 30)):
        cluster.reader.reading = Reading(cluster.now, {CLIPS: (IDLE, load(waiting_s), IDLE)})
        answer, _ = wrapped(cluster.contexts(requests=5))
        assert answer[DeploymentID(DENOISE, "app")] == expected
        cluster.targets[DENOISE] = expected
        cluster.now += 1


def test_serve_starts_no_replica_for_calls_that_have_ended():
    """Serve sees the mean of the last 30 s, and would want a replica again as soon as the last has gone."""
    cluster = Cluster()
    wrapped = _apply_app_level_autoscaling_config(cluster.policy)
    cluster.reader.reading = Reading(cluster.now, {CLIPS: (IDLE, IDLE, IDLE)})
    answer, _ = wrapped(cluster.contexts(requests=0.5))
    assert set(answer.values()) == {0}
    cluster.reader.reading = None  # where nothing is known, Serve's own rule helps
    answer, _ = wrapped(cluster.contexts(requests=0.5))
    assert answer == {}


def test_a_change_is_logged_once(monkeypatch: pytest.MonkeyPatch):
    told: list[str] = []
    monkeypatch.setattr("deployments.dispatch.autoscaling.logger.info", lambda message, **_: told.append(message))
    cluster = Cluster()
    for _ in range(3):
        cluster.reader.reading = Reading(cluster.now, {CLIPS: (IDLE, load(300), IDLE)})
        cluster.policy(cluster.contexts())  # and Serve does not follow
    assert told == ["clips-denoise: 0 -> 10 replicas for 300 s of work"]


def test_a_decision_for_thousands_of_replicas_takes_no_time():
    cluster = Cluster(highest=4000)
    cluster.tick(load(1e6))
    began = time.perf_counter()
    for _ in range(100):
        cluster.tick(load(1e6))
    assert time.perf_counter() - began < 1.0  # 10 ms each, with the contexts; the policy alone takes a tenth of a millisecond
