"""Webhooks through the app: from a submission with `fal_webhook` to the receiver, and what can be looked up later."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest

from deployments.dispatch import dispatcher as dispatcher_module
from deployments.dispatch.dispatcher import Dispatcher
from deployments.files.file_store import FileStore
from deployments.ingress.app import create_app
from deployments.jobs.job import NewJob
from deployments.jobs.store import JobStore
from deployments.settings import FetchSettings, Settings
from deployments.webhooks.outbox import SETTLE_S, Outbox
from engines.errors import ImageLoadError
from tests.conftest import execute
from tests.deployments.webhooks.receiver import Receiver, answering, courier_of, is_signed, receiving
from tests.fakes import ScriptedStages, for_ever
from tests.patience import PATIENCE_S

ENDPOINT = "fal-ai/animatediff-sparsectrl-lcm"
SUBMIT = f"/queue/{ENDPOINT}"
INPUT = {"prompt": "a red ball", "seed": 42}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path, fetch=FetchSettings(allow_private=True))


@pytest.fixture
async def client(settings: Settings, store: JobStore) -> AsyncIterator[httpx.AsyncClient]:
    async with calling(settings, store) as client:
        yield client


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving(answering(200)) as receiver:
        yield receiver


def calling(settings: Settings, store: JobStore, base_url: str = "http://localhost:8000", **headers: str) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=create_app(settings, store))
    return httpx.AsyncClient(transport=transport, base_url=base_url, headers=headers)


async def act(job_input: dict[str, Any]) -> None:
    if job_input["prompt"] == "unreadable":
        raise ImageLoadError("no image", ("body", "keyframe_0_image_url"))
    if job_input["prompt"] == "endless":
        await for_ever(job_input)


@asynccontextmanager
async def working(store: JobStore, files: FileStore, settings: Settings) -> AsyncIterator[None]:
    """A dispatcher and a courier, as in one replica."""
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(
                Dispatcher(store, files, {ENDPOINT: ScriptedStages(act)}, settings.queue, settings.retention).run()
            ),
            group.create_task(courier_of(Outbox(store.database), settings).run()),
        ]
        yield
        for task in tasks:
            task.cancel()


async def submitted(client: httpx.AsyncClient, url: str, **job: Any) -> str:
    response = await client.post(SUBMIT, json={**INPUT, **job}, params={"fal_webhook": url})
    assert response.status_code == 200, response.text
    request_id: str = response.json()["request_id"]
    return request_id


async def settled(database: str) -> None:
    """Makes webhooks old enough to be listed."""
    await execute(database, f"UPDATE webhook_outbox SET created_at = created_at - interval '{SETTLE_S} s'")


async def delivered(client: httpx.AsyncClient, request_id: str) -> dict[str, Any]:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            response = await client.get(f"/webhooks/deliveries/{request_id}")
            if response.status_code == 200 and response.json()["status"] == "delivered":
                entry: dict[str, Any] = response.json()
                return entry
            await asyncio.sleep(0.02)


async def test_whoever_submits_with_a_webhook_is_told_what_the_result_request_answers(
    client: httpx.AsyncClient, store: JobStore, files: FileStore, settings: Settings, receiver: Receiver, monkeypatch
) -> None:
    monkeypatch.setattr(dispatcher_module, "SWEEP_INTERVAL_S", 0.1)
    async with working(store, files, settings):
        good = await submitted(client, receiver.url("/good"))
        bad = await submitted(client, receiver.url("/bad"), prompt="unreadable")
        invalid = await submitted(client, receiver.url("/invalid"), num_inference_steps=-1)
        endless = await submitted(client, receiver.url("/cancelled"), prompt="endless")
        await client.put(f"{SUBMIT}/requests/{endless}/cancel")
        quiet = (await client.post(SUBMIT, json=INPUT)).json()["request_id"]
        for request_id in (good, bad, invalid, endless):
            await delivered(client, request_id)
        assert (await client.get(f"/webhooks/deliveries/{quiet}")).status_code == 404
    keys = (await client.get("/.well-known/jwks.json")).json()
    told = {request.path.strip("/"): request for request in receiver.received}
    assert set(told) == {"good", "bad", "invalid", "cancelled"}
    for path, request_id in {"good": good, "bad": bad, "invalid": invalid, "cancelled": endless}.items():
        request, result = told[path], await client.get(f"{SUBMIT}/requests/{request_id}")
        assert is_signed(request, keys, time.time())
        assert request.json["payload"] == result.json()
        assert request.json["request_id"] == request.json["gateway_request_id"] == request_id
        if path == "good":
            assert set(request.json) == {"request_id", "gateway_request_id", "status", "payload"}
            assert request.json["payload"]["video"]["url"].startswith("http://localhost:8000/files/")
        else:
            assert request.json["error"] == f"Invalid status code: {result.status_code}"


async def test_files_are_named_by_the_address_that_was_submitted_to(
    store: JobStore, files: FileStore, settings: Settings, receiver: Receiver
) -> None:
    public = settings.model_copy(update={"public_url": "https://public.example/"})
    async with (
        working(store, files, settings),
        calling(settings, store, "https://queue.fal.run") as by_host,
        calling(public, store) as by_setting,
    ):
        response = await by_host.post(f"/{ENDPOINT}", json=INPUT, params={"fal_webhook": receiver.url("/host")})
        assert response.status_code == 200
        await submitted(by_setting, receiver.url("/public"))
        await receiver.arrival(2)
    urls = {request.path: request.json["payload"]["video"]["url"] for request in receiver.received}
    assert urls["/host"].startswith("https://queue.fal.run/files/")
    assert urls["/public"].startswith("https://public.example/files/")


async def test_keys_are_published_for_caches_and_where_receivers_know_them(
    client: httpx.AsyncClient, store: JobStore, settings: Settings
) -> None:
    response = await client.get("/.well-known/jwks.json")
    assert response.headers["cache-control"] == "public, max-age=3600"
    kid = (await Outbox(store.database).signing_key()).id
    assert [key["kid"] for key in response.json()["keys"]] == [kid, f"{kid}-padded"]
    assert set(response.json()["keys"][0]) == {"kty", "crv", "x", "kid", "use", "alg"}
    for host in ("rest.fal.ai", "rest.alpha.fal.ai"):
        async with calling(settings, store, f"https://{host}") as as_fal:
            assert (await as_fal.get("/.well-known/jwks.json")).json() == response.json()


async def test_a_receiver_that_was_down_catches_up_by_pages(
    client: httpx.AsyncClient, store: JobStore, database: str, receiver: Receiver
) -> None:
    began = datetime.now(UTC) - timedelta(minutes=1)
    ids = []
    for _ in range(5):
        ids.append(await submitted(client, receiver.url()))
        await client.put(f"{SUBMIT}/requests/{ids[-1]}/cancel")
    assert (await client.get("/webhooks/deliveries")).json()["deliveries"] == [], "no webhook is old enough"
    await settled(database)
    await execute(database, "UPDATE webhook_outbox SET created_at = (SELECT min(created_at) FROM webhook_outbox)")  # equal times

    seen, cursor = [], ""
    while True:
        params = {"since": began.isoformat(), "limit": "2", "cursor": cursor}
        page = (await client.get("/webhooks/deliveries", params=params)).json()
        cursor = page["next_cursor"]
        if not page["deliveries"]:
            break
        seen += [entry["request_id"] for entry in page["deliveries"]]
    assert sorted(seen) == sorted(ids)
    assert page["deliveries"] == []

    late = await submitted(client, receiver.url())
    await client.put(f"{SUBMIT}/requests/{late}/cancel")
    await settled(database)
    page = (await client.get("/webhooks/deliveries", params={"cursor": cursor})).json()
    assert [entry["request_id"] for entry in page["deliveries"]] == [late], "the last cursor continues with newer entries"
    [entry] = page["deliveries"]
    assert (entry["status"], entry["attempts"], entry["webhook"]) == ("pending", 0, None)


@pytest.mark.parametrize("since", ["tomorrow", "2999-01-01T00:00:00+00:00", "2999-01-01", "32472144000"])
async def test_since_is_a_time_in_either_form(client: httpx.AsyncClient, database: str, receiver: Receiver, since: str) -> None:
    request_id = await submitted(client, receiver.url())
    await client.put(f"{SUBMIT}/requests/{request_id}/cancel")
    await settled(database)
    response = await client.get(f"/webhooks/deliveries?since={since}")  # the plus sign is not escaped
    assert response.status_code == (400 if since == "tomorrow" else 200)
    assert not response.json().get("deliveries")
    assert len((await client.get("/webhooks/deliveries?since=2020-01-01T00:00:00Z")).json()["deliveries"]) == 1


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=101",
        "limit=-1",
        "limit=0100000",
        "limit=x",
        "cursor=x",
        "cursor=1-2",
        f"cursor={10**30}-{UUID(int=0).hex}",
        "since=nan",
        "since=inf",
        "since=1e300",
        "since=0001-01-01T00:00:00%2B14:00",
        "since=9999-12-31T23:59:59-14:00",
    ],
)
async def test_an_impossible_page_is_refused(client: httpx.AsyncClient, query: str) -> None:
    response = await client.get(f"/webhooks/deliveries?{query}")
    assert (response.status_code, response.json()["error_type"]) == (400, "bad_request")


async def test_an_owner_sees_the_log_and_has_a_webhook_sent_again(
    client: httpx.AsyncClient, store: JobStore, files: FileStore, settings: Settings, receiver: Receiver
) -> None:
    async with working(store, files, settings):
        request_id = await submitted(client, receiver.url())
        entry = await delivered(client, request_id)
        assert entry["webhook"] == receiver.received[0].json
        assert [(line["attempt"], line["status"], line["error"]) for line in entry["log"]] == [(1, 200, None)]
        again = await client.post(f"/webhooks/deliveries/{request_id}/redeliver")
        assert (again.status_code, again.json()) == (202, {"status": "REDELIVERY_REQUESTED"})
        assert again.headers["x-fal-request-id"] == request_id
        await receiver.arrival(2)
    assert receiver.received[0].body == receiver.received[1].body


async def test_a_key_sees_and_redelivers_as_its_scopes_say(
    store: JobStore, settings: Settings, database: str, receiver: Receiver
) -> None:
    closed = settings.model_copy(update={"auth": "keys"})
    mine = await store.keys.create("mine", scopes=["submit"])
    reader, operator = await store.keys.create("r", scopes=["admin"]), await store.keys.create("o", scopes=["admin", "submit"])
    async with calling(closed, store) as client:

        async def answers(secret: str) -> list[int]:
            key = {"authorization": f"Key {secret}"}
            path = f"/webhooks/deliveries/{request_id}"
            seen = [await client.get(path, headers=key), await client.post(f"{path}/redeliver", headers=key)]
            return [response.status_code for response in seen]

        client.headers["authorization"] = f"Key {mine}"
        request_id = await submitted(client, receiver.url())
        await client.put(f"{SUBMIT}/requests/{request_id}/cancel")
        await settled(database)
        assert [await answers(secret) for secret in (mine, reader, operator)] == [[403, 202], [200, 403], [200, 202]]


async def test_another_keys_webhooks_are_unknown(store: JobStore, settings: Settings, database: str, receiver: Receiver) -> None:
    closed = settings.model_copy(update={"auth": "keys"})
    mine, other = await store.keys.create("mine"), await store.keys.create("other")
    async with (
        calling(closed, store, authorization=f"Key {mine}") as client,
        calling(closed, store, authorization=f"Key {other}") as stranger,
        calling(closed, store) as nobody,
    ):
        request_id = await submitted(client, receiver.url())
        await client.put(f"{SUBMIT}/requests/{request_id}/cancel")
        await settled(database)
        path = f"/webhooks/deliveries/{request_id}"
        assert (await client.get(path)).status_code == 200
        assert len((await client.get("/webhooks/deliveries")).json()["deliveries"]) == 1
        for response in (await stranger.get(path), await stranger.post(f"{path}/redeliver"), await client.get(f"{path}0")):
            assert (response.status_code, response.json()) == (404, {"status": "NOT_FOUND"})
        assert (await stranger.get("/webhooks/deliveries")).json()["deliveries"] == []
        for response in (
            await nobody.get(path),
            await nobody.get("/webhooks/deliveries"),
            await nobody.post(f"{path}/redeliver"),
        ):
            assert response.status_code == 401
        assert (await nobody.get("/.well-known/jwks.json")).status_code == 200

        async with receiving(answering(200)), asyncio.TaskGroup() as group:
            task = group.create_task(courier_of(Outbox(store.database), closed).run())
            await receiver.arrival()
            task.cancel()
    assert receiver.received[0].headers["x-fal-webhook-user-id"] == mine.partition(":")[0]


async def test_a_webhook_without_a_courier_waits(store: JobStore, client: httpx.AsyncClient, receiver: Receiver) -> None:
    job = await store.submit(NewJob(ENDPOINT, INPUT, webhook_url=receiver.url()))
    assert (await client.get(f"/webhooks/deliveries/{job.id}")).status_code == 404, "the job has not ended"
    await store.request_cancel(job.id)
    entry = (await client.get(f"/webhooks/deliveries/{job.id}")).json()
    assert (entry["status"], entry["attempts"], entry["log"], entry["webhook"]) == ("pending", 0, [], None)
