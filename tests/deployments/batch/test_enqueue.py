import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path

import asyncpg
import pytest

from deployments.batch.enqueue import Enqueue, ServiceFailed
from deployments.batch.records import Ended, Record
from deployments.batch.run_folder import RunFolder
from deployments.files.file_store import FileStore
from deployments.ingress.app import create_app
from deployments.jobs.job import JobSummary
from deployments.jobs.store import JobStore
from deployments.settings import Settings
from tests.deployments.batch.runs import manifest_of, prepared
from tests.wire.service import VIDEO, listening, working


@pytest.fixture
async def service(store: JobStore, database: str, tmp_path: Path) -> AsyncIterator[str]:
    """The URL of a service whose work takes no time."""
    settings = Settings(home=tmp_path / "home")
    async with listening(create_app(settings, database)) as url, working(store, FileStore(settings.files_url), step_s=0.01):
        yield url


def a_run(tmp_path: Path, url: str, prompts: list[str], **run: object) -> RunFolder:
    (tmp_path / "a.png").write_bytes(b"a picture")
    rows = [
        {"id": f"row-{n}", "prompt": prompt, "keyframe_0_image_url": "a.png", "keyframe_0_index": 0}
        for n, prompt in enumerate(prompts)
    ]
    folder = RunFolder(str(tmp_path / "out"))
    prepared(folder, manifest_of(tmp_path / "rows.jsonl", rows), Settings(), {"service": url, "concurrency": 3} | run)
    return folder


async def jobs_are(store: JobStore, so: Callable[[list[JobSummary]], bool]) -> None:
    """Returns once the service's jobs are as asked for."""
    while not so(await store.recent(100)):  # noqa: ASYNC110  (the store has no such event)
        await asyncio.sleep(0.02)


async def made(folder: RunFolder) -> list[Record]:
    run = folder.run()
    assert run.service is not None
    ended = Ended(folder)
    rows = (row for row in folder.rows() if ended.status(row) is None)
    async with aclosing(Enqueue(folder, run, run.service).records(rows)) as records:
        return [record async for record in records]


async def test_a_service_renders_the_rows_at_low_priority_a_few_at_a_time(
    service: str, store: JobStore, database: str, tmp_path: Path
):
    folder = a_run(tmp_path, service, ["x", "slow", "x", "fails GenerationFailed", "fails ImageLoadError", "x", "x"])
    records = {record.id: record for record in await made(folder)}
    statuses = [records[f"row-{n}"].status for n in range(7)]
    assert statuses == ["done", "done", "done", "failed", "refused", "done", "done"]
    assert records["row-3"].error_type == "internal_server_error"
    assert folder.read("videos/row-1.mp4") == VIDEO
    connection = await asyncpg.connect(database)
    jobs = await connection.fetch("SELECT priority, input::jsonb ->> 'keyframe_0_image_url' AS image FROM jobs")
    await connection.close()
    assert [job["priority"] for job in jobs] == [1] * 7
    assert len({job["image"] for job in jobs}) == 1  # sent once
    assert [record.id for record in await made(folder)] == ["row-3"]  # what was not the row's fault is tried again
    assert len(await store.recent(100)) == 7


async def test_a_run_that_was_killed_finds_its_jobs_again(service: str, store: JobStore, tmp_path: Path):
    folder = a_run(tmp_path, service, ["slow"] * 3)
    run = folder.run()
    killed = Enqueue(folder, run, service)
    submitted = [asyncio.create_task(killed._render(row)) for row in folder.rows()]
    await jobs_are(store, lambda jobs: len(jobs) == 3)
    assert [record.status for record in await made(folder)] == ["done"] * 3
    await asyncio.gather(*submitted)
    for client in (killed.http, killed.files):
        await client.aclose()
    assert len(await store.recent(100)) == 3


async def test_a_run_that_is_stopped_cancels_its_jobs_and_submits_them_anew(service: str, store: JobStore, tmp_path: Path):
    folder = a_run(tmp_path, service, ["x", "endless", "endless"])
    run = folder.run()
    async with aclosing(Enqueue(folder, run, service).records(folder.rows())) as records:
        assert (await anext(records)).id == "row-0"
    await jobs_are(store, lambda jobs: len(jobs) == 3 and all(job.state.ended for job in jobs))
    again = asyncio.create_task(made(folder))
    await jobs_are(store, lambda jobs: len(jobs) == 5)
    again.cancel()
    with pytest.raises(asyncio.CancelledError):
        await again


async def test_a_service_that_refuses_the_key_ends_the_run(database: str, tmp_path: Path):
    settings = Settings(home=tmp_path / "home", auth="keys")
    async with listening(create_app(settings, database)) as url:
        folder = a_run(tmp_path, url, ["x"])
        with pytest.raises(ServiceFailed, match="refuses the key"):
            await made(folder)


async def test_a_service_that_stays_away_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("deployments.batch.enqueue.PATIENCE_S", 0.1)
    monkeypatch.setattr("deployments.batch.enqueue.PAUSE_S", 0.05)
    with pytest.raises(ServiceFailed, match="has not answered"):
        await made(a_run(tmp_path, "http://127.0.0.1:9", ["x"]))
