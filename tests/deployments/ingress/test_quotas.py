"""What one caller costs: large inputs become files of their job, and a key has so much at once."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import httpx
import pytest

from deployments.files.file_store import FileStore
from deployments.ingress import quotas
from deployments.ingress.app import create_app
from deployments.jobs.store import JobStore
from deployments.schemas.inputs import KEPT
from deployments.settings import FetchSettings, QuotaSettings, Settings

ENDPOINT = "fal-ai/animatediff-sparsectrl-lcm"
SUBMIT = f"/queue/{ENDPOINT}"
FIELD = "keyframe_0_image_url"
PICTURE = bytes(range(256)) * 200
URI = "data:image/png;base64," + base64.b64encode(PICTURE).decode()
KEYED = {"Idempotency-Key": "render 7"}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path, fetch=FetchSettings(max_bytes=100_000))


@pytest.fixture
async def client(settings: Settings, store: JobStore) -> AsyncIterator[httpx.AsyncClient]:
    async with calling(settings, store) as client:
        yield client


@pytest.fixture
async def sql(database: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database)
    yield connection
    await connection.close()


def calling(settings: Settings, store: JobStore, **headers: str) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=create_app(settings, store))
    return httpx.AsyncClient(transport=transport, base_url="http://localhost:8000", headers=headers)


def picture(uri: str = URI, **given: Any) -> dict[str, Any]:
    return {"prompt": "a", FIELD: uri, "keyframe_0_index": 0} | given


def inputs(settings: Settings) -> list[Path]:
    return list((Path(settings.files_url) / "inputs").glob("*/*"))


# Files


async def test_a_large_input_is_a_file_of_its_job_until_that_ends(
    client: httpx.AsyncClient, settings: Settings, store: JobStore, sql: asyncpg.Connection
) -> None:
    links = (await client.post(SUBMIT, json=picture(mask_url=URI))).json()
    [file] = inputs(settings)  # the unknown field's is none
    assert file.read_bytes() == PICTURE
    row = await sql.fetchrow("SELECT input::text AS input, input_files FROM jobs")
    assert len(row["input"]) < 1000
    assert json.loads(row["input"])[FIELD] == KEPT + row["input_files"][0]
    until = "SELECT expires_at::text FROM stored_files WHERE name = $1"
    assert await sql.fetchval(until, row["input_files"][0]) == "infinity"
    assert (await client.get(f"/files/{row['input_files'][0]}")).status_code == 404

    assert (await client.put(links["cancel_url"])).status_code == 202
    await sql.execute("UPDATE stored_files SET expires_at = expires_at - interval '10 minutes'")
    assert await store.retention.expire_files(FileStore(settings.files_url).delete) == 1
    assert inputs(settings) == []


@pytest.mark.parametrize(
    ("uri", "type_"),
    [
        (URI.replace(";base64", ""), "file_download_error"),
        (URI + "!", "file_download_error"),
        ("data:;base64," + "A" * 200_000, "file_too_large"),
    ],
    ids=["no base64", "a bad character", "too large"],
)
async def test_a_bad_file_is_told_at_once_and_with_a_webhook_as_the_jobs_end(
    uri: str, type_: str, client: httpx.AsyncClient, settings: Settings
) -> None:
    refused = await client.post(SUBMIT, json=picture(uri))
    [detail] = refused.json()["detail"]
    assert (refused.status_code, detail["loc"], detail["type"]) == (422, ["body", FIELD], type_)
    links = (await client.post(SUBMIT, json=picture(uri), params={"fal_webhook": "https://h.example/"})).json()
    assert (await client.get(links["response_url"])).json() == refused.json()
    assert inputs(settings) == []


async def test_a_text_as_long_as_a_file_is_no_file(client: httpx.AsyncClient) -> None:
    refused = await client.post(SUBMIT, json={"prompt": URI})
    assert [(d["loc"], d["type"]) for d in refused.json()["detail"]] == [(["body", "prompt"], "string_too_long")]


async def test_a_repeat_stores_no_second_file(client: httpx.AsyncClient, settings: Settings) -> None:
    first, again = [await client.post(SUBMIT, json=picture(seed=1), headers=KEYED) for _ in range(2)]
    assert first.json() == again.json()
    assert len(inputs(settings)) == 1
    other = await client.post(SUBMIT, json=picture(URI.replace("AAEC", "AAAC", 1), seed=1), headers=KEYED)
    assert (other.status_code, other.json()["error_type"]) == (422, "idempotency_key_reused")


async def test_a_refused_input_with_a_webhook_leaves_its_key_to_one_with_a_file(client: httpx.AsyncClient) -> None:
    hook = {"fal_webhook": "https://h.example/"}
    refused = await client.post(SUBMIT, json={}, headers=KEYED, params=hook)
    mended = await client.post(SUBMIT, json=picture(), headers=KEYED, params=hook)
    assert mended.status_code == 200
    assert mended.json()["request_id"] != refused.json()["request_id"]


async def test_a_body_of_unknown_fields_is_answered_in_short_and_so_is_every_poll(
    client: httpx.AsyncClient, settings: Settings, store: JobStore
) -> None:
    many = {f"{i:05}" * 100: 1 for i in range(300)}
    submitted = await client.post(SUBMIT, json={"prompt": "a"} | many)
    assert len(submitted.headers["x-reelray-ignored-fields"]) < 2000
    async with calling(settings.model_copy(update={"unknown_fields": "refuse"}), store) as strict:
        links = (await strict.post(SUBMIT, json={"prompt": "a"} | many, params={"fal_webhook": "https://h.example/"})).json()
        for url in (links["status_url"], links["response_url"]):
            assert len((await strict.get(url)).content) < 10_000


# Quotas


async def keyed(settings: Settings, store: JobStore, **limits: int | None) -> tuple[httpx.AsyncClient, str]:
    """A client with a key of its own, and the key's id."""
    secret = await store.keys.create("studio")
    limited = settings.model_copy(update={"auth": "keys", "quotas": QuotaSettings(**limits)})
    return calling(limited, store, authorization=f"Key {secret}"), secret.partition(":")[0]


async def test_a_key_has_so_many_jobs_waiting_and_repeats_are_none(
    settings: Settings, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = await keyed(settings, store, waiting_jobs=2)
    other, _ = await keyed(settings, store, waiting_jobs=2)
    async with client, other:
        first = await client.post(SUBMIT, json={"prompt": "a", "seed": 1}, headers=KEYED)
        assert (await client.post(SUBMIT, json={"prompt": "a"})).status_code == 200
        refused = await client.post(SUBMIT, json={"prompt": "a"})
        assert (refused.status_code, refused.json()["error_type"]) == (429, "too_many_requests")
        assert (await client.post(SUBMIT, json={"prompt": "a", "seed": 1}, headers=KEYED)).json() == first.json()
        assert (await other.post(SUBMIT, json={"prompt": "a"})).status_code == 200
        assert await store.claims.take([ENDPOINT], 30.0) is not None
        monkeypatch.setattr(quotas, "REFRESH_S", 0.0)
        async with calling(settings.model_copy(update={"auth": "open"}), store) as everybody:
            assert (await everybody.post(SUBMIT, json={"prompt": "a"})).status_code == 200


async def test_a_count_is_renewed_and_covers_all_endpoints(
    settings: Settings, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quotas, "REFRESH_S", 0.0)
    client, _ = await keyed(settings, store, waiting_jobs=2)
    media = {"image_url": "https://a.example/i.png", "video_url": "https://a.example/v.mp4"}
    async with client:
        assert (await client.post("/queue/fal-ai/controlnext", json=media)).status_code == 200
        low = {"x-fal-queue-priority": "low"}
        assert (await client.post(SUBMIT, json={"prompt": "a"}, headers=low)).status_code == 200
        assert (await client.post(SUBMIT, json={"prompt": "a"})).status_code == 429
        assert await store.claims.take([ENDPOINT], 30.0) is not None
        assert (await client.post(SUBMIT, json={"prompt": "a"})).status_code == 200


async def test_a_key_stores_so_many_bytes_until_its_jobs_end(
    settings: Settings, store: JobStore, sql: asyncpg.Connection
) -> None:
    client, key_id = await keyed(settings, store, stored_bytes=120_000)
    async with client:
        for status in (200, 200, 429):
            assert (await client.post(SUBMIT, json=picture())).status_code == status
        assert (await client.post(SUBMIT, json={"prompt": "a"})).status_code == 200
    usage = await store.keys.usage(key_id, at_most=2)
    assert (usage.waiting, usage.stored_bytes) == (2, 2 * len(PICTURE))
    await sql.execute("UPDATE stored_files SET expires_at = now()")
    await store.retention.expire_files(FileStore(settings.files_url).delete)
    assert (await store.keys.usage(key_id, at_most=None)).stored_bytes == 0


async def test_a_key_has_so_many_streams_open(settings: Settings, store: JobStore) -> None:
    client, key_id = await keyed(settings, store, open_streams=1)
    async with client:
        links = (await client.post(SUBMIT, json={"prompt": "a"})).json()
        watched = asyncio.create_task(client.get(links["status_url"] + "/stream"))
        while not client._transport.app.state.quotas._streams[key_id]:  # type: ignore[attr-defined]  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        refused = await client.get(links["status_url"] + "/stream")
        assert (refused.status_code, refused.json()["error_type"]) == (429, "too_many_requests")
        await store.request_cancel(UUID(links["request_id"]))
        assert "COMPLETED" in (await watched).text
        assert (await client.get(links["status_url"] + "/stream")).status_code == 200
