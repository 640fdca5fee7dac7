import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from urllib.parse import urlsplit

import pytest

from deployments.dispatch.backlog import BacklogReader, Decision, Pace, StageLoad, learn, loads
from deployments.jobs.job import NewJob
from deployments.jobs.store import JobStore
from deployments.jobs.work import Arrived, Measured, Running, StageStatus, Waiting, stages
from tests.conftest import execute
from tests.deployments.dispatch.test_autoscaling import CLIPS, Clips

UNITS = (10.0, 100.0, 20.0)
TIMES = (1.0, 2.0, 0.5)
END_CONNECTIONS = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{}'"
RUNNING = Running(CLIPS.id, UNITS, 4)


def test_nothing_is_no_load():
    assert loads(TIMES, None, []) == [StageLoad()] * 3


def test_what_waits_and_arrives_is_counted_in_seconds_of_each_stage():
    waiting = Waiting(2, (20, 200, 40), 8)
    arrived = [Arrived(10, 1, UNITS), Arrived(60, 4, (60, 600, 120))]  # one is no rate; of four two are sure
    assert loads(TIMES, waiting, [], arrived) == [
        StageLoad(20, arriving=0.5, parallel=2, job_s=10, here_s=20),
        StageLoad(400, arriving=10, parallel=8, job_s=200),
        StageLoad(20, arriving=0.5, parallel=2, job_s=10),
    ]


@pytest.mark.parametrize(
    ("told", "waiting_s", "here_s", "running_s", "busy"),
    [
        ((None, None), (10, 200, 10), (10, 0, 0), (0, 0, 0), (0, 0, 0)),  # claimed, and its turn has not come
        (("preprocess", 0.5), (0, 200, 10), (0, 0, 0), (5, 0, 0), (1, 0, 0)),
        (("preprocess", 1), (0, 200, 10), (0, 200, 0), (0, 0, 0), (0, 0, 0)),  # it waits for a denoiser
        (
            ("denoise", 0),
            (0, 150, 10),
            (0, 150, 0),
            (0, 50, 0),
            (0, 1, 0),
        ),  # four units at a time: others could take over three
        (("denoise", 0.5), (0, 75, 10), (0, 75, 0), (0, 25, 0), (0, 1, 0)),
        (("decode", 0.75), (0, 0, 0), (0, 0, 0), (0, 0, 2.5), (0, 0, 1)),
        (("decode", 1), (0, 0, 0), (0, 0, 0), (0, 0, 0), (0, 0, 0)),
        (("decode", math.nan), (10, 200, 10), (10, 0, 0), (0, 0, 0), (0, 0, 0)),
        (("lunch", 0.5), (10, 200, 10), (10, 0, 0), (0, 0, 0), (0, 0, 0)),
        (("denoise", "half"), (10, 200, 10), (10, 0, 0), (0, 0, 0), (0, 0, 0)),
    ],
)
def test_a_running_job_counts_with_what_is_left_of_it(
    told: tuple[str, float],
    waiting_s: Sequence[float],
    here_s: Sequence[float],
    running_s: Sequence[float],
    busy: Sequence[float],
):
    stage, fraction = told
    found = loads(TIMES, None, [replace(RUNNING, stage=stage, fraction=fraction)])
    assert [each.waiting_s for each in found] == list(waiting_s)
    assert [each.here_s for each in found] == list(here_s)
    assert [each.running_s for each in found] == list(running_s)
    assert [each.busy for each in found] == list(busy)
    assert [each.job_s for each in found] == [10, 200, 10]


def test_a_units_time_is_that_of_the_last_jobs_and_before_any_the_known_one():
    pace = Pace(3.0)
    assert pace.unit_s == 3.0
    for seconds in (None, "1", math.nan, -1.0, 0):
        pace.add(10, seconds)
    pace.add(0, 5.0)
    assert pace.unit_s == 3.0
    pace.add(10, 20.0)
    assert pace.unit_s == 2.0
    for _ in range(300):
        pace.add(10, 5.0)
    assert pace.unit_s == pytest.approx(0.5, rel=0.02)


def test_jobs_of_several_endpoints_teach_their_own_stages():
    paces = {name: [Pace(1.0) for _ in range(3)] for name in ("a", "b")}
    learn(paces, [Measured("a", UNITS, {"denoise": 50.0}), Measured("b", UNITS, {"decode": 2.0})])
    assert [pace.unit_s for pace in paces["a"]] == [1.0, 0.5, 1.0]
    assert [pace.unit_s for pace in paces["b"]] == [1.0, 1.0, 0.1]


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():  # noqa: ASYNC110  (another thread makes it true)
            await asyncio.sleep(0.02)


async def ended(reader: BacklogReader) -> None:
    """Waits until the reader's thread has closed its connections."""
    reader.stop()
    assert reader.thread is not None
    await asyncio.to_thread(reader.thread.join, 20)
    assert not reader.thread.is_alive()


async def test_a_thread_reads_the_database_and_survives_its_loss(
    postgres: str, database: str, store: JobStore, monkeypatch: pytest.MonkeyPatch
):
    """A dead database leaves the last reading, which grows old; the policy then holds."""
    monkeypatch.setattr("deployments.dispatch.backlog.INTERVAL_S", 0.02)
    monkeypatch.setattr("deployments.dispatch.backlog.SHARE", 1.0)
    monkeypatch.setattr("deployments.dispatch.backlog.OUTAGE_PAUSE_S", 0.05)
    monkeypatch.setattr("deployments.jobs.database.RIDE_OUT_S", 0.0)
    clips = Clips(unit_times=TIMES)
    calls = 0

    def find() -> tuple[str, list[Clips]]:
        nonlocal calls
        calls += 1
        return database, [clips]

    await store.submit(NewJob(clips.id, {}, units=UNITS))
    reader = BacklogReader(find)
    reader.start()
    try:
        await until(lambda: reader.reading is not None)
        assert reader.reading is not None
        assert [load.waiting_s for load in reader.reading.endpoints[clips]] == [10, 200, 10]
        reader.decisions = {"clips-denoise": Decision(1, 2, 50.0, 40.0)}
        async with asyncio.timeout(20):
            while not (kept := await stages(store.database)):  # noqa: ASYNC110  (the database tells nobody)
                await asyncio.sleep(0.02)
        assert kept[0][0] == StageStatus(clips.id, "denoise", 2.0, 40.0, 50.0, 1, 2)

        name = urlsplit(database).path[1:]
        await execute(postgres, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        await execute(postgres, END_CONNECTIONS.format(name))
        seen = calls
        await until(lambda: calls > seen + 2)
        old = reader.reading
        await asyncio.sleep(0.2)
        assert reader.reading is old

        await execute(postgres, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        await until(lambda: reader.reading is not old)
        assert reader.reading.ready_s == {"clips-denoise": 40.0}  # what the first connection's time has measured
    finally:
        await ended(reader)
