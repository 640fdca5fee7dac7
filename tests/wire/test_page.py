"""What the client from npm does when the database fails under it. What it relies on otherwise is in `cases/`."""

from uuid import UUID

import pytest

from deployments.jobs.job import Job, NewJob
from deployments.jobs.store import JobStore
from tests.wire.page import PageClient
from tests.wire.service import ENDPOINT, Wire

INPUT = {"prompt": "Drone footage, futuristic city at night", "seed": 42}


async def test_status_survives_a_database_that_is_away_for_a_moment(
    page: PageClient, store: JobStore, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    request_id = (await page("submit", ENDPOINT, input=INPUT)).value["request_id"]
    get, reads = store.get, list[UUID]()

    async def away_once(job_id: UUID, lines_after: int | None = None) -> Job | None:
        reads.append(job_id)
        if len(reads) == 1:
            raise ConnectionRefusedError
        return await get(job_id, lines_after)

    monkeypatch.setattr(store, "get", away_once)
    assert (await page("status", ENDPOINT, requestId=request_id)).value["status"] == "IN_QUEUE"
    assert wire.count("GET", "/status") == 2


async def test_submit_of_unknown_outcome_is_not_repeated(
    page: PageClient, store: JobStore, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lost(new: NewJob) -> Job:
        raise ConnectionResetError("connection to 10.0.0.5 lost")

    monkeypatch.setattr(store, "submit", lost)
    submitted = await page("submit", ENDPOINT, input=INPUT)
    assert submitted.error is not None
    assert submitted.error["status"] == 500
    assert "10.0.0.5" not in str(submitted.error)
    assert wire.count("POST", ENDPOINT) == 1
