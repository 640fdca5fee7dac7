"""fal-client from PyPI calls the app: recipe P4 of fal-queue-protocol.md, which is P1 without TLS."""

from collections.abc import AsyncIterator

import fal_client
import fal_client.client
import httpx
import pytest

from deployments.files.file_store import FileStore
from deployments.ingress.app import create_app
from deployments.jobs.store import JobStore
from deployments.settings import Settings
from tests.wire.service import ENDPOINT, Wire, listening, working

INPUT = {"prompt": "Drone footage, futuristic city at night", "seed": 42}


@pytest.fixture
async def client(base_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[fal_client.AsyncClient]:
    monkeypatch.setattr(fal_client.client, "QUEUE_URL_FORMAT", f"{base_url}/queue/")
    client = fal_client.AsyncClient(key="anything")
    yield client
    await (await client._client).aclose()  # it has no public method to close it


async def test_subscribe(client: fal_client.AsyncClient, store: JobStore, files: FileStore, wire: Wire) -> None:
    updates: list[fal_client.Status] = []
    async with working(store, files):
        result = await client.subscribe(ENDPOINT, INPUT, with_logs=True, on_queue_update=updates.append)
    assert result["seed"] == 42
    assert result["video"]["url"].startswith("http://127.0.0.1:")
    done = updates[-1]
    assert isinstance(done, fal_client.Completed)
    assert done.logs is not None
    assert [item["message"] for item in done.logs] == ["step 1/4", "step 2/4", "step 3/4", "step 4/4"]
    assert [item["seq"] for item in done.logs] == [1, 2, 3, 4]
    assert [item["progress"]["step"] for item in done.logs] == [{"done": done, "total": 4} for done in range(1, 5)]
    assert done.metrics == {"inference_time": 0.2}


async def test_handle_can_be_rebuilt_and_followed(client: fal_client.AsyncClient, store: JobStore, files: FileStore) -> None:
    handle = await client.submit(ENDPOINT, INPUT, priority="low", start_timeout=30)
    assert await client.get_handle(ENDPOINT, handle.request_id) == handle
    assert await handle.status(with_logs=True) == fal_client.Queued(position=0)
    async with working(store, files):
        result = await handle.get()
    assert result == await handle.get() == await client.result(ENDPOINT, handle.request_id)
    status = await handle.status()
    assert isinstance(status, fal_client.Completed)
    assert status.logs is None


async def test_cancelled_request_completes_and_its_result_raises(client: fal_client.AsyncClient) -> None:
    handle = await client.submit(ENDPOINT, INPUT)
    await handle.cancel()
    status = await handle.status()
    assert isinstance(status, fal_client.Completed)
    assert status.error_type == "client_cancelled"
    with pytest.raises(fal_client.FalClientHTTPError) as caught:
        await handle.get()
    assert (caught.value.status_code, caught.value.error_type) == (499, "client_cancelled")
    await handle.cancel()  # a repeated cancel is answered as the first one


async def test_invalid_input_raises_at_submit_with_the_field(client: fal_client.AsyncClient, wire: Wire) -> None:
    with pytest.raises(fal_client.FalClientHTTPError) as caught:
        await client.submit(ENDPOINT, {"prompt": "x", "num_inference_steps": 0})
    assert caught.value.status_code == 422
    detail: object = caught.value.message
    assert isinstance(detail, list)
    assert detail[0]["loc"] == ["body", "num_inference_steps"]
    assert len(wire.requests) == 1


async def test_token_is_taken_in_place_of_the_key(settings: Settings, store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    async with listening(create_app(settings.model_copy(update={"auth": "keys"}), store)) as url:
        monkeypatch.setattr(fal_client.client, "QUEUE_URL_FORMAT", f"{url}/queue/")
        monkeypatch.setattr(fal_client.client, "REST_URL", f"{url}/rest")
        client = fal_client.AsyncClient(key=await store.keys.create("studio"))
        handle = await client.submit(ENDPOINT, INPUT)
        token = await client._get_realtime_token(ENDPOINT)  # the first step of `realtime`, whose next steps we do not serve yet
        await (await client._client).aclose()
        async with httpx.AsyncClient() as page:
            answer = await page.get(handle.status_url, params={"fal_jwt_token": token})
            assert (answer.status_code, answer.json()["status"]) == (202, "IN_QUEUE")
            assert (await page.get(handle.status_url)).status_code == 401


async def test_missing_scope_is_told_and_not_retried(
    settings: Settings, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire = Wire(create_app(settings.model_copy(update={"auth": "keys"}), store))
    async with listening(wire) as url:
        monkeypatch.setattr(fal_client.client, "QUEUE_URL_FORMAT", f"{url}/queue/")
        client = fal_client.AsyncClient(key=await store.keys.create("reader", scopes=["read"]))
        with pytest.raises(fal_client.FalClientHTTPError) as caught:
            await client.submit(ENDPOINT, INPUT)
        await (await client._client).aclose()
    assert (caught.value.status_code, caught.value.error_type) == (403, "forbidden")
    assert wire.count("POST", ENDPOINT) == 1
