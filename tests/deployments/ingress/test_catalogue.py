"""What is served, and what became of a key's requests."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.ingress.app import create_app
from deployments.jobs.job import NewJob
from deployments.jobs.keys import Scope
from deployments.jobs.store import JobStore
from deployments.schemas.endpoint import ENDPOINTS
from deployments.schemas.failures import error_failure
from deployments.schemas.inputs import KEPT
from deployments.settings import Settings
from engines.errors import ImageLoadError, ReelrayError, RunnerFailed
from tests.conftest import execute

ANIMATEDIFF, CONTROLNEXT = ENDPOINTS
MODELS, HISTORY = "/v1/models", "/v1/models/requests/by-endpoint"
INPUT = {"prompt": "a", "keyframe_0_image_url": f"{KEPT}inputs/x"}
VIDEO = {"url": "/files/x/video.mp4", "content_type": "video/mp4", "file_name": "video.mp4", "file_size": 10}


@pytest.fixture
async def client(store: JobStore, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(Settings(home=tmp_path), store)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        yield client


async def got(client: httpx.AsyncClient, path: str, **query: Any) -> dict[str, Any]:
    response = await client.get(path, params=query)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


async def test_the_catalogue_lists_what_is_served_and_finds_it(client: httpx.AsyncClient):
    page = await got(client, MODELS)
    assert [model["endpoint_id"] for model in page["models"]] == sorted(ENDPOINTS)
    assert (page["next_cursor"], page["has_more"]) == (None, False)
    about = page["models"][0]["metadata"]
    assert (about["category"], about["status"]) == ("text-to-video", "active")
    assert about["model_url"] == f"http://localhost/queue/{ANIMATEDIFF}"
    for query, found in (
        ({"q": "driving person"}, [CONTROLNEXT]),
        ({"q": "sparsectrl"}, [ANIMATEDIFF]),
        ({"category": "video-to-video"}, [CONTROLNEXT]),
        ({"endpoint_id": [CONTROLNEXT, "acme/none"]}, [CONTROLNEXT]),
        ({"status": "deprecated"}, []),
    ):
        assert [model["endpoint_id"] for model in (await got(client, MODELS, **query))["models"]] == found


async def test_the_catalogue_comes_in_pages_and_with_documents(client: httpx.AsyncClient):
    first = await got(client, MODELS, limit=1, expand="openapi-3.0")
    assert first["models"][0]["openapi"]["info"]["title"] == f"Queue OpenAPI for {ANIMATEDIFF}"
    assert first["has_more"]
    last = await got(client, MODELS, limit=1, cursor=first["next_cursor"])
    assert [model["endpoint_id"] for model in last["models"]] == [CONTROLNEXT]
    assert (last["has_more"], last["models"][0]["openapi"]) == (False, None)


async def ended(store: JobStore, how: ReelrayError | str, endpoint: str = ANIMATEDIFF, owner: str | None = None) -> str:
    """The id of a job that has ended so: "success", "cancelled", or with an error."""
    job = await store.submit(NewJob(endpoint, INPUT, owner))
    if how == "cancelled":
        await store.request_cancel(job.id)
        return str(job.id)
    claim = await store.claims.take([endpoint], 60, 60)
    assert claim is not None
    assert claim.job_id == job.id
    if isinstance(how, ReelrayError):
        await store.claims.fail(claim, error_failure(how), {})
    else:
        await store.claims.succeed(claim, {"video": VIDEO, "seed": 1}, {})
    return str(job.id)


async def test_a_history_has_the_requests_that_ended_newest_first_in_pages(client: httpx.AsyncClient, store: JobStore):
    ids = [await ended(store, how) for how in ("success", ImageLoadError(), RunnerFailed(), "cancelled", "success")]
    await ended(store, "success", CONTROLNEXT)
    await store.submit(NewJob(ANIMATEDIFF, INPUT))
    await store.claims.take([ANIMATEDIFF], 60, 60)
    page = await got(client, HISTORY, endpoint_id=ANIMATEDIFF)
    assert [item["request_id"] for item in page["items"]] == ids[::-1]
    assert [item["status_code"] for item in page["items"]] == [200, 499, 500, 422, 200]
    assert (page["has_more"], page["next_cursor"]) == (False, None)
    newest = page["items"][0]
    sent, began, end = (datetime.fromisoformat(newest[name]) for name in ("sent_at", "started_at", "ended_at"))
    assert sent <= began <= end
    assert newest["duration"] == pytest.approx((end - began).total_seconds(), abs=0.001)
    assert page["items"][1]["started_at"] is page["items"][1]["duration"] is None, "cancelled before it began"

    seen, cursor = [], ""
    while cursor is not None:
        page = await got(client, HISTORY, endpoint_id=ANIMATEDIFF, limit=2, cursor=cursor)
        seen += [item["request_id"] for item in page["items"]]
        cursor = page["next_cursor"]
        if len(seen) == 2:
            await ended(store, "success")  # what ends meanwhile moves no page
    assert seen == ids[::-1]


async def test_a_history_is_asked_for_by_state_by_time_and_by_request(client: httpx.AsyncClient, store: JobStore, database: str):
    ids = [await ended(store, how) for how in ("success", ImageLoadError(), RunnerFailed(), "cancelled")]
    for age_h, request_id in ((3, ids[0]), (2, ids[1]), (1, ids[2])):
        await execute(database, f"UPDATE jobs SET finished_at = now() - interval '{age_h} h' WHERE id = '{request_id}'")

    async def found(**query: Any) -> list[str]:
        page = await got(client, HISTORY, endpoint_id=ANIMATEDIFF, **query)
        return [item["request_id"] for item in page["items"]]

    def ago(hours: float) -> str:
        return (datetime.now(UTC) - timedelta(hours=hours)).isoformat()

    assert await found(status="success") == [ids[0]]
    assert await found(status="error") == [ids[2]]
    assert await found(status="user_error") == [ids[3], ids[1]]
    assert await found(status="success,error") == [ids[2], ids[0]]
    assert await found(start=ago(2.5)) == ids[:0:-1]
    assert await found(end=ago(1.5)) == [ids[1], ids[0]]
    assert await found(start=ago(2.5), end=ago(0.5)) == [ids[2], ids[1]]
    assert await found(request_id=ids[1]) == [ids[1]]
    await execute(database, f"UPDATE jobs SET finished_at = now() - interval '25 h' WHERE id = '{ids[0]}'")
    assert await found() == ids[:0:-1], "without times, the last day"
    assert await found(start=ago(26)) == ids[::-1]


async def test_payloads_are_given_on_request_without_what_only_we_understand(client: httpx.AsyncClient, store: JobStore):
    await ended(store, "success")
    (item,) = (await got(client, HISTORY, endpoint_id=ANIMATEDIFF))["items"]
    assert item["json_input"] is item["json_output"] is None
    (item,) = (await got(client, HISTORY, endpoint_id=ANIMATEDIFF, expand="payloads"))["items"]
    assert item["json_input"] == {"prompt": "a", "keyframe_0_image_url": None}
    assert item["json_output"] == {"video": VIDEO | {"url": "http://localhost/files/x/video.mp4"}, "seed": 1}


async def test_a_key_sees_its_own_history_only(store: JobStore, tmp_path: Path):
    keys = [await store.keys.create(name, scopes=[Scope.READ]) for name in ("one", "other")]
    silent = await store.keys.create("silent", scopes=[Scope.SUBMIT])
    ids = [await ended(store, "success", owner=key.partition(":")[0]) for key in keys]
    app = create_app(Settings(home=tmp_path, auth="keys"), store)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        for key, request_id in zip(keys, ids, strict=True):
            client.headers["authorization"] = f"Key {key}"
            page = await got(client, HISTORY, endpoint_id=ANIMATEDIFF)
            assert [item["request_id"] for item in page["items"]] == [request_id]
            assert (await got(client, HISTORY, endpoint_id=ANIMATEDIFF, request_id=ids[0]))["items"] == (
                page["items"] if request_id == ids[0] else []
            )
        for header, status in ((f"Key {silent}", 403), ("Key of:nobody", 401)):
            response = await client.get(HISTORY, params={"endpoint_id": ANIMATEDIFF}, headers={"authorization": header})
            assert response.status_code == status


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ({}, 400),
        ({"endpoint_id": "acme/none"}, 404),
        ({"limit": "0"}, 400),
        ({"limit": "101"}, 400),
        ({"limit": "x"}, 400),
        ({"start": "yesterday"}, 400),
        ({"end": "9999-12-31T23:59:59-12:00"}, 400),
        ({"status": "fine"}, 400),
        ({"request_id": "7"}, 400),
        ({"cursor": "x"}, 400),
        ({"cursor": "9" * 30 + "-" + "0" * 32}, 400),
        ({"expand": "everything"}, 400),
    ],
)
async def test_a_malformed_question_is_told_in_the_platforms_words(client: httpx.AsyncClient, query: dict[str, str], status: int):
    asked = query if not query or "endpoint_id" in query else {"endpoint_id": ANIMATEDIFF} | query
    response = await client.get(HISTORY, params=asked)
    assert response.status_code == status
    error = response.json()["error"]
    assert error["message"]
    assert error["request_id"] == response.headers["x-fal-request-id"]
    assert error["type"] == ("bad_request" if status == 400 else "not_found")
