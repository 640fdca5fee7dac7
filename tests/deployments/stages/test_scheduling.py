import math
import random
from collections import Counter
from itertools import pairwise

import pytest

from deployments.stages.scheduling import Scheduler
from tests.deployments.stages.simulated import LATENCY_S, Sim, SimJob, pool, unit_of


@pytest.mark.parametrize(("replicas", "least"), [(1, 0.95), (2, 0.95), (4, 0.92), (8, 0.9), (13, 0.9), (26, 0.9)])
def test_replicas_reach_nine_tenths_of_the_ideal(replicas: int, least: float):
    sim = pool(replicas)
    job = sim.submit(SimJob(units=26, steps=20))
    sim.run()
    ideal_s = math.ceil(26 / replicas) * 0.2 * 20
    assert ideal_s / job.took_s >= least
    assert sim.most_at_a_replica <= 2
    assert sim.scheduler.at_rest


def test_units_of_uneven_length_leave_no_replica_idle_for_long():
    uneven = random.Random(5)
    sim = pool(8, duration=lambda _, unit_s: unit_s * uneven.uniform(0.8, 1.2))
    job = sim.submit(SimJob(units=26, steps=20))
    sim.run()
    assert math.ceil(26 / 8) * 0.2 * 20 / job.took_s >= 0.88


@pytest.mark.parametrize(
    ("replicas", "units", "long_units"), [(1, 2, 26), (2, 2, 26), (3, 2, 26), (2, 6, 26), (8, 2, 26), (8, 10, 52), (4, 1, 7)]
)
def test_a_short_job_beside_a_long_one_ends_within_twice_its_solo_time(replicas: int, units: int, long_units: int):
    alone = pool(replicas)
    solo = alone.submit(SimJob(units=units, steps=10))
    alone.run()
    worst = 0.0
    for n in range(4):  # the long one is anywhere in its step when the short one comes
        sim = pool(replicas)
        sim.submit(SimJob(units=long_units, steps=100))
        short = SimJob(units=units, steps=10)
        sim.at(5 + n * 0.23, lambda sim=sim, short=short: sim.submit(short))
        sim.run(30)
        worst = max(worst, short.took_s)
    assert worst <= 2 * solo.took_s


def test_urgent_jobs_come_first_and_each_jobs_units_in_order():
    sim = pool(1)
    late = sim.submit(SimJob(units=4, steps=2, priority=5))
    urgent = sim.submit(SimJob(units=3, steps=1, priority=1))
    sim.run()
    told = [(job is urgent, step, n) for _, (job, step, n) in sim.ran]
    assert told[:2] == [(False, 0, 0), (False, 0, 1)], "they were sent before the urgent ones came"
    assert told[2:5] == [(True, 0, 0), (True, 0, 1), (True, 0, 2)]
    assert told[5:7] == [(False, 0, 2), (False, 0, 3)]
    assert late.counted == 8


def test_an_endless_stream_of_urgent_jobs_does_not_stop_a_late_one():
    sim, urgent = pool(2), list[SimJob]()
    late = sim.submit(SimJob(units=4, steps=5, priority=1))

    def keep_six() -> None:
        urgent[:] = [job for job in urgent if job.ended_at is None]
        urgent.extend(sim.submit(SimJob(units=2, steps=1)) for _ in range(6 - len(urgent)))
        sim.at(0.1, keep_six)

    sim.at(0.5, keep_six)
    sim.run(20 * 7 * 4 / 10)
    assert late.ended_at is not None, "it had a quarter of its seventh of ten units a second"


def test_new_jobs_of_one_unit_are_served_in_the_order_in_which_they_came():
    sim, jobs = pool(1), list[SimJob]()
    for n in range(20):
        sim.at(n * 0.05, lambda: jobs.append(sim.submit(SimJob(units=1, steps=1))))
    sim.run()
    ends = [job.ended_at for job in jobs]
    assert sum(one <= other for one, other in pairwise(ends)) >= 18  # type: ignore[operator]


def test_jobs_of_one_priority_have_equal_shares_and_a_new_one_is_not_behind():
    sim = pool(2)
    jobs = [sim.submit(SimJob(units=4, steps=30)) for _ in range(3)]
    sim.at(6.001, lambda: jobs.append(sim.submit(SimJob(units=4, steps=30))))
    sim.run(6)
    assert max(job.counted for job in jobs) - min(job.counted for job in jobs) <= 8
    before = [job.counted for job in jobs]
    sim.run(14)
    gained = [job.counted - n for job, n in zip(jobs, [*before, 0], strict=True)]
    assert max(gained) - min(gained) <= 8, "a step for its start, and a step under way"


def test_a_unit_goes_where_its_namesake_ran_unless_that_leaves_a_replica_idle():
    sim = pool(4)
    sim.submit(SimJob(units=26, steps=30))
    sim.run()
    places: dict[int, Counter[str]] = {}
    for replica, (_, _, n) in sim.ran:
        if n % 2 == 0:
            places.setdefault(n, Counter())[replica] += 1
    at_home = sum(counter.most_common(1)[0][1] for counter in places.values()) / sum(c.total() for c in places.values())
    assert at_home >= 0.8
    busy = [replica.busy_s for replica in sim.replicas.values()]
    assert min(busy) >= 0.8 * max(busy)


def test_a_dead_replicas_units_run_elsewhere_and_no_others_are_repeated():
    sim = pool(3)
    job = sim.submit(SimJob(units=26, steps=5))
    sim.at(1.0, lambda: sim.kill("r1"))
    sim.run()
    assert job.counted == 26 * 5
    assert len(sim.ran) <= 26 * 5 + 2, "at most the two that were there"
    assert job.took_s <= 1.0 + (26 * 5 / 2) * 0.2, "no slower than two replicas"
    assert sim.scheduler.at_rest


def test_a_new_replica_works_within_a_step():
    sim = pool(1)
    job = sim.submit(SimJob(units=26, steps=2))
    sim.at(1.0, lambda: sim.add("new"))
    sim.run()
    first = next(unit for replica, unit in sim.ran if replica == "new")
    assert first[1] == 0, "the step in which it came"
    assert job.took_s <= (26 * 2 * 0.2) * 0.62


def test_a_straggler_is_run_twice_and_the_first_answer_counts():
    slow_from = {"at": 2.0}
    sim = Sim(duration=lambda name, unit_s: 60.0 if name == "r1" and sim.now > slow_from["at"] else unit_s)
    for name in ("r0", "r1", "r2"):
        sim.add(name)
    job = sim.submit(SimJob(units=8, steps=20))
    sim.run()
    assert job.counted == 8 * 20
    twice = [unit for unit, times in Counter((id(u[0]), *u[1:]) for _, u in sim.ran).items() if times > 1]
    assert 1 <= len(twice) <= 2, "the replica that hangs gets no more"
    assert job.took_s < 8 * 20 * 0.2 / 2 * 1.25 + 1.0
    assert sim.scheduler.at_rest


def test_without_idle_replicas_nothing_is_run_twice():
    sim = pool(2, duration=lambda name, unit_s: unit_s * (5 if name == "r1" else 1))
    sim.submit(SimJob(units=200, steps=1))
    sim.run(5)
    assert max(Counter(unit for _, unit in sim.ran).values()) == 1


def test_a_unit_that_waits_behind_a_slow_one_is_taken_over_by_an_idle_replica():
    sim = pool(2, duration=lambda name, unit_s: unit_s * (10 if name == "r1" else 1))
    job = sim.submit(SimJob(units=8, steps=1))
    sim.run()
    assert job.took_s < 2.0, "before the first at r1 has ended"
    assert [replica for replica, _ in sim.ran].count("r1") == 1


def test_a_replica_that_leaves_gets_no_more_and_its_last_answers_count():
    sim = pool(2)
    job = sim.submit(SimJob(units=26, steps=3))
    sim.at(1.0, lambda: (sim.scheduler.leave("r1"), sim.pump()))
    sim.run()
    assert len(sim.ran) == 26 * 3
    assert job.counted == 26 * 3
    assert sim.scheduler.replicas == 1
    at_r1 = sum(replica == "r1" for replica, _ in sim.ran)
    assert 5 <= at_r1 <= 7


def test_without_replicas_units_wait():
    sim = Sim()
    job = sim.submit(SimJob(units=2, steps=1))
    sim.run()
    assert job.ended_at is None
    assert sim.scheduler.due_in_s() is None
    sim.add("r0")
    sim.run()
    assert job.ended_at is not None


def test_a_cancel_takes_a_jobs_units_out_at_once_and_frees_every_replica_within_one_unit():
    sim = pool(4)
    gone, other = SimJob(units=26, steps=5), SimJob(units=8, steps=40)
    sim.submit(gone)
    sim.submit(other)
    sim.run(1.5)
    sim.cancel(gone)
    before = len(sim.ran)
    sim.run(1.5 + 0.2 + 3 * LATENCY_S)
    assert not any(unit[0] is gone for _, unit in sim.ran[before:])
    assert not any(unit_of(run).asked is gone for replica in sim.replicas.values() for run in replica.queue)
    sim.run()
    assert other.counted == 8 * 40


def test_ten_thousand_random_cancels_with_replicas_that_come_and_go_leak_nothing():
    dice = random.Random(11)
    sim = pool(8, duration=lambda _, unit_s: unit_s * dice.uniform(0.5, 1.5) * (10 if dice.random() < 0.005 else 1))
    cancelled, finished = 0, 0
    born = 8

    def churn() -> None:
        nonlocal born
        sim.kill(dice.choice(list(sim.replicas)))
        sim.at(0.5, lambda name=f"r{born}": sim.add(name))
        born += 1

    while cancelled < 10_000:
        jobs = [SimJob(dice.randint(1, 6), dice.randint(1, 4), 0.05, priority=dice.randint(0, 2)) for _ in range(12)]
        for job in jobs:
            sim.submit(job)
        for job in jobs[1:]:
            sim.at(dice.uniform(0, 0.25), lambda job=job: sim.cancel(job))
        if dice.random() < 0.05:
            sim.at(dice.uniform(0, 0.3), churn)
        sim.run(sim.now + dice.uniform(0.1, 0.5))
        cancelled += sum(job.cancelled for job in jobs)
        finished += sum(job.ended_at is not None for job in jobs)
    sim.run()
    assert cancelled >= 10_000
    assert finished > 200
    assert sim.scheduler.at_rest
    assert sim.scheduler.replicas == 8
    assert not any(replica.queue for replica in sim.replicas.values())


def test_jobs_of_many_kinds_all_end_with_every_unit_counted_once():
    for seed in range(20):
        dice = random.Random(seed)
        sim = pool(dice.randint(1, 6), duration=lambda _, unit_s, dice=dice: unit_s * dice.uniform(0.3, 4))
        jobs = [SimJob(dice.randint(1, 30), dice.randint(1, 4), dice.choice([0.05, 0.4]), dice.randint(0, 1)) for _ in range(6)]
        for job in jobs:
            sim.at(dice.uniform(0, 3), lambda job=job, sim=sim: sim.submit(job))
        sim.at(2.0, lambda sim=sim: sim.add("new"))
        sim.at(2.5, lambda sim=sim: sim.kill("r0"))
        sim.run()
        assert [job.counted for job in jobs] == [job.units * job.steps for job in jobs]
        assert sim.scheduler.at_rest


def test_the_backlog_is_known_in_seconds_once_the_pace_is():
    sim = pool(1)
    assert sim.scheduler.waiting_s is None
    sim.submit(SimJob(units=10, steps=1))
    sim.run(0.75)
    assert sim.scheduler.waiting_s == pytest.approx((10 - 3 - 2) * 0.2, rel=0.1)


def test_a_scheduler_knows_no_replica_that_left_without_work():
    scheduler = Scheduler(lambda: 0.0)
    scheduler.join("r0")
    scheduler.leave("r0")
    scheduler.leave("never there")
    assert scheduler.replicas == 0
