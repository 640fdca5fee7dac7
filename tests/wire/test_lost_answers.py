"""Submissions whose answer is lost on the way, and which fal's own clients then repeat without asking."""

import asyncio
from uuid import UUID

import fal_client
import fal_client.client
import pytest

from deployments.jobs.store import JobStore
from tests.wire.cutting import cutting
from tests.wire.page import PageClient
from tests.wire.service import ENDPOINT, Wire

N = 30


async def inputs_of(store: JobStore, request_ids: list[str]) -> list[int]:
    """The seeds of the waiting jobs, in the order of `request_ids`."""
    seeds = {}
    while claim := await store.claim([ENDPOINT], 60):
        seeds[claim.job_id] = claim.input["seed"]
    assert len(seeds) == len(request_ids)
    return [seeds[UUID(request_id)] for request_id in request_ids]


async def test_every_python_caller_gets_the_one_job_of_its_own(
    base_url: str, store: JobStore, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = fal_client.AsyncClient(key="anything")
    async with cutting(base_url) as (url, proxy):
        monkeypatch.setattr(fal_client.client, "QUEUE_URL_FORMAT", f"{url}/queue/")
        handles = await asyncio.gather(
            *(client.submit(ENDPOINT, {"prompt": "x", "seed": i}, headers={"Idempotency-Key": f"key {i}"}) for i in range(N))
        )
        await (await client._client).aclose()  # it has no public way to be closed
    assert len(proxy.cut) == N
    assert wire.count("POST", ENDPOINT) == 2 * N
    assert await inputs_of(store, [handle.request_id for handle in handles]) == list(range(N))


async def test_every_javascript_caller_gets_the_one_job_of_its_own(page: PageClient, store: JobStore, wire: Wire) -> None:
    async with cutting(page.base_url) as (url, proxy):
        submits = [
            {"input": {"prompt": "x", "seed": i}, "headers": {"Idempotency-Key": f"key {i}"}, "priority": "normal"}
            for i in range(N)
        ]
        done = await PageClient(url)("submitAll", ENDPOINT, submits=submits)
    assert done.error is None
    assert len(proxy.cut) == N
    assert wire.count("POST", ENDPOINT) == 2 * N
    assert await inputs_of(store, [answer["request_id"] for answer in done.value]) == list(range(N))


async def test_equal_submissions_without_a_key_are_a_job_each(
    base_url: str, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = fal_client.AsyncClient(key="anything")
    monkeypatch.setattr(fal_client.client, "QUEUE_URL_FORMAT", f"{base_url}/queue/")
    handles = await asyncio.gather(*(client.submit(ENDPOINT, {"prompt": "x", "seed": 1}) for _ in range(N)))
    await (await client._client).aclose()
    assert await inputs_of(store, [handle.request_id for handle in handles]) == [1] * N


async def test_a_key_with_another_body_is_told_at_once_and_not_retried(
    page: PageClient, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    keyed = {"Idempotency-Key": "key"}
    assert (await page("submit", ENDPOINT, input={"prompt": "x"}, headers=keyed)).error is None
    told = await page("submit", ENDPOINT, input={"prompt": "y"}, headers=keyed)
    assert told.error is not None
    assert (told.error["status"], told.error["body"]["error_type"]) == (422, "idempotency_key_reused")
    client = fal_client.AsyncClient(key="anything")
    monkeypatch.setattr(fal_client.client, "QUEUE_URL_FORMAT", f"{page.base_url}/queue/")
    with pytest.raises(fal_client.FalClientHTTPError) as caught:
        await client.submit(ENDPOINT, {"prompt": "z"}, headers=keyed)
    await (await client._client).aclose()
    assert (caught.value.status_code, caught.value.error_type) == (422, "idempotency_key_reused")
    assert wire.count("POST", ENDPOINT) == 3
