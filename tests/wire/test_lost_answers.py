"""A small run of `python -m tests.wire.lost_answers`, and another effect of keys on the clients."""

import fal_client
import fal_client.client
import pytest

from deployments.jobs.store import JobStore
from tests.wire.lost_answers import by_javascript, by_python, seeds_told, without_keys
from tests.wire.page import PageClient
from tests.wire.service import ENDPOINT, Wire

N = 30


async def test_every_python_caller_gets_the_one_job_of_its_own(base_url: str, store: JobStore, wire: Wire) -> None:
    told = await by_python(base_url, wire, N)
    assert (told.cut, told.posts) == (N, 2 * N)
    assert await seeds_told(store, told.ids) == list(range(N))


async def test_every_javascript_caller_gets_the_one_job_of_its_own(page: PageClient, store: JobStore, wire: Wire) -> None:
    told = await by_javascript(page.base_url, wire, N)
    assert (told.cut, told.posts) == (N, 2 * N)
    assert await seeds_told(store, told.ids) == list(range(N))


async def test_equal_submissions_without_a_key_are_a_job_each(base_url: str, store: JobStore) -> None:
    assert await seeds_told(store, await without_keys(base_url, N)) == [1] * N


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
