import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import pytest

from deployments.dispatch.job_log import BURST, MOST_WAITING, JobLog
from deployments.jobs.database import StoreAway
from deployments.jobs.job import Claim, LeaseLost, LogLine, NewJob
from deployments.jobs.store import JobStore
from deployments.stages.progress import Stage, StageProgress
from deployments.stages.protocol import Note
from engines.errors import RunnerFailed
from engines.spec import Progress
from tests.fakes import ENDPOINT
from tests.patience import PATIENCE_S


def step(done: int, total: int = 100_000, stage: Stage = "denoise") -> Note:
    progress = StageProgress(stage, Progress("step", done, total))
    return Note(progress.message, progress=progress)


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are written however busy the machine is."""
    monkeypatch.setattr("deployments.dispatch.job_log.FLUSH_S", PATIENCE_S)


@pytest.fixture
async def claim(store: JobStore) -> Claim:
    await store.submit(NewJob(ENDPOINT, {"prompt": "a"}))
    claim = await store.claims.take([ENDPOINT], 60)
    assert claim is not None
    return claim


async def lines(store: JobStore, claim: Claim, met: Callable[[list[LogLine]], bool] = lambda _: True) -> list[LogLine]:
    async with asyncio.timeout(PATIENCE_S), store.watch_lines(claim.job_id) as changes:
        while not met(lines := await store.logs(claim.job_id)):
            await changes.changed(0.2)
    return lines


async def messages(store: JobStore, claim: Claim) -> list[str]:
    return [line.message for line in await lines(store, claim)]


async def test_lines_are_there_in_their_order_when_it_ends(store: JobStore, claim: Claim):
    said = [f"warning {k}" for k in range(50)]
    async with JobLog(store.claims, claim) as job_log:
        for message in said:
            job_log.note(Note(message, "WARN"))
    assert await messages(store, claim) == said


async def test_a_short_job_shows_each_of_its_steps(store: JobStore, claim: Claim):
    async with JobLog(store.claims, claim) as job_log:
        for done in range(5):
            job_log.note(step(done, 4))
    told = await lines(store, claim)
    assert [line.seq for line in told] == [1, 2, 3, 4, 5]
    assert [line.progress for line in told][3] == {
        "stage": "denoise",
        "fraction": 0.75,
        "eta_s": None,
        "step": {"done": 3, "total": 4},
    }


async def test_of_too_much_progress_the_first_and_the_last_of_each_stage_are_told(store: JobStore, claim: Claim):
    stages: tuple[Stage, ...] = ("preprocess", "denoise", "decode")
    began = time.monotonic()
    async with JobLog(store.claims, claim) as job_log:
        for stage in stages:
            for done in range(1000):
                job_log.note(step(done, stage=stage))
                await asyncio.sleep(0)
            job_log.stage_ended()
    told = await messages(store, claim)
    for stage in stages:
        of_stage = [message for message in told if message.startswith(stage)]
        assert (of_stage[0], of_stage[-1]) == (f"{stage}: step 0/100000", f"{stage}: step 999/100000")
    assert len(told) <= BURST + 2 * len(stages) + time.monotonic() - began


async def test_the_latest_progress_is_told_as_soon_as_it_may(store: JobStore, claim: Claim, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("deployments.dispatch.job_log.BURST", 1)
    began = time.monotonic()
    async with JobLog(store.claims, claim) as job_log:
        for done in range(100):
            job_log.note(step(done))
            await asyncio.sleep(0.001)
        told = await lines(store, claim, lambda lines: lines[-1:] != [] and lines[-1].message.endswith("99/100000"))
    assert len(told) <= 2 + time.monotonic() - began


async def test_progress_is_told_less_often_the_older_the_attempt_is(store: JobStore, claim: Claim):
    now = 0.0
    written: list[float] = []

    class Store:
        async def log(self, *_: object) -> bool:
            written.append(now)
            return True

    job_log = JobLog(Store(), claim, lambda: now)  # type: ignore[arg-type]
    async with job_log:
        for second in range(7200):
            now = float(second)
            job_log.note(step(second))
            for _ in range(3):
                await asyncio.sleep(0)
    assert 550 < len(written) < 650
    assert len([at for at in written if at < 100]) > 80
    assert len([at for at in written if at >= 3600]) in range(110, 125), "every 30 s"


async def test_a_slow_database_does_not_slow_the_stage(store: JobStore, claim: Claim, monkeypatch: pytest.MonkeyPatch):
    log, answered = store.claims.log, asyncio.Event()
    began = time.monotonic()

    async def slow(*given: Any) -> bool:
        await answered.wait()
        return await log(*given)

    monkeypatch.setattr(store.claims, "log", slow)
    async with JobLog(store.claims, claim) as job_log:
        for done in range(1000):
            job_log.note(step(done))
            await asyncio.sleep(0)
        job_log.note(Note("the prompt was cut", "WARN"))
        assert await messages(store, claim) == []
        answered.set()
    first, *others, warning, last = await messages(store, claim)
    assert (first, warning, last) == ("denoise: step 0/100000", "the prompt was cut", "denoise: step 999/100000")
    assert len(others) <= BURST + time.monotonic() - began


async def test_a_database_that_does_not_answer_holds_up_the_end_for_a_while_only(
    store: JobStore, claim: Claim, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    async def never(*_: object) -> bool:
        await asyncio.Event().wait()
        return True

    monkeypatch.setattr(store.claims, "log", never)
    monkeypatch.setattr("deployments.dispatch.job_log.FLUSH_S", 0.05)
    async with asyncio.timeout(PATIENCE_S), JobLog(store.claims, claim) as job_log:
        job_log.note(step(1))
    assert "the last log lines were not written" in caplog.text


async def test_lines_that_come_faster_than_they_can_be_written_are_counted(store: JobStore, claim: Claim):
    async with JobLog(store.claims, claim) as job_log:
        for k in range(100_000):
            job_log.note(Note(f"warning {k}", "WARN"))
    told = await messages(store, claim)
    assert len(told) == MOST_WAITING + 1
    assert told[-1] == f"{100_000 - MOST_WAITING} lines are left out here: they came faster than they could be written"


async def test_a_full_log_is_written_to_no_more(store: JobStore, claim: Claim, monkeypatch: pytest.MonkeyPatch):
    tried: list[str] = []

    async def full(claim: Claim, message: str, *_: object) -> bool:
        tried.append(message)
        return False

    monkeypatch.setattr(store.claims, "log", full)
    async with JobLog(store.claims, claim) as job_log:
        for k in range(100):
            job_log.note(Note(f"warning {k}"))
            await asyncio.sleep(0)
    assert tried == ["warning 0"]


async def test_a_line_waits_for_the_database_and_one_that_cannot_be_written_is_left_out(
    store: JobStore, claim: Claim, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("deployments.jobs.database.OUTAGE_PAUSE_S", 0.01)
    log, troubles = store.claims.log, iter([StoreAway(), StoreAway(), None, ValueError()])

    async def troubled(*given: Any) -> bool:
        if trouble := next(troubles, None):
            raise trouble
        return await log(*given)

    monkeypatch.setattr(store.claims, "log", troubled)
    async with JobLog(store.claims, claim) as job_log:
        for message in ("one", "two", "three"):
            job_log.note(Note(message))
    assert await messages(store, claim) == ["one", "three"]


async def test_a_lost_lease_is_told_at_the_next_note_and_at_the_end(
    store: JobStore, claim: Claim, monkeypatch: pytest.MonkeyPatch
):
    async def fail(*_: object) -> bool:
        raise LeaseLost

    async def work(*, notes: int, error: Exception | None = None) -> None:
        async with JobLog(store.claims, claim) as job_log:
            for done in range(notes):
                job_log.note(step(done))
                for _ in range(20):  # turns of the loop, in which the line is tried
                    await asyncio.sleep(0)
                assert done < 1, "the stage was not stopped at its next note"
            if error is not None:
                raise error

    monkeypatch.setattr(store.claims, "log", fail)
    with pytest.raises(LeaseLost):
        await work(notes=1)
    with pytest.raises(LeaseLost):
        await work(notes=2)
    with pytest.raises(RunnerFailed):  # the stage's own error takes precedence
        await work(notes=1, error=RunnerFailed())


async def test_what_a_failed_stage_had_told_is_written(store: JobStore, claim: Claim, caplog: pytest.LogCaptureFixture):
    async def fail() -> None:
        async with JobLog(store.claims, claim) as job_log:
            job_log.note(step(1))
            job_log.note(step(2))
            raise RunnerFailed

    caplog.set_level(logging.WARNING)
    with pytest.raises(RunnerFailed):
        await fail()
    assert await messages(store, claim) == ["denoise: step 1/100000", "denoise: step 2/100000"]
    assert not caplog.records
