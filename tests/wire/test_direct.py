"""Direct calls beneath the clients: what becomes of their jobs, and what the clients cannot say or hide."""

import asyncio
import base64
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import msgpack
import pytest
import websockets
from websockets.exceptions import ConnectionClosed, InvalidStatus

from deployments.files.file_store import FileStore
from deployments.hosting.logs import hide_queries
from deployments.ingress.app import create_app
from deployments.jobs.job import Job, JobState, NewJob
from deployments.jobs.store import JobStore
from deployments.schemas.inputs import KEPT
from deployments.settings import QuotaSettings, Settings
from tests.patience import PATIENCE_S
from tests.wire.service import ENDPOINT, LEASE_S, Wire, listening, working

RUN = f"/run/{ENDPOINT}"
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def ended(store: JobStore) -> Job:
    """The newest job, when it has ended."""
    async with asyncio.timeout(PATIENCE_S):
        while not (jobs := await store.recent(1)) or not jobs[0].state.ended:  # noqa: ASYNC110  (no id to watch yet)
            await asyncio.sleep(0.02)
    job = await store.get(jobs[0].id)
    assert job is not None
    return job


async def running(store: JobStore) -> UUID:
    """The newest job, once it runs."""
    async with asyncio.timeout(PATIENCE_S):
        while not (jobs := await store.recent(1)) or jobs[0].state is not JobState.RUNNING:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return jobs[0].id


@pytest.fixture
async def http(base_url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=base_url, timeout=PATIENCE_S) as client:
        yield client


def socket_url(base_url: str, query: str = "") -> str:
    return f"ws{base_url.removeprefix('http')}{RUN}/realtime{query}"


@pytest.mark.parametrize("path", [RUN, f"{RUN}/stream"])
async def test_a_caller_that_hangs_up_cancels_its_job(
    http: httpx.AsyncClient, store: JobStore, files: FileStore, path: str
) -> None:
    async with working(store, files):
        calling = asyncio.create_task(http.post(path, json={"prompt": "endless"}))
        await running(store)
        calling.cancel()
        job = await ended(store)
    assert job.state is JobState.CANCELLED


@pytest.mark.parametrize("path", [RUN, f"{RUN}/stream"])
async def test_a_caller_with_an_idempotency_key_comes_back_for_its_output(
    http: httpx.AsyncClient, store: JobStore, files: FileStore, path: str
) -> None:
    headers, job_input = {"idempotency-key": "1"}, {"prompt": "slow", "seed": 7}
    async with working(store, files):
        calling = asyncio.create_task(http.post(path, json=job_input, headers=headers))
        job_id = await running(store)
        calling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await calling
        again = await http.post(RUN, json=job_input, headers=headers)
    assert (again.json()["seed"], again.headers["x-fal-request-id"]) == (7, str(job_id))


async def test_a_websocket_that_hangs_up_cancels_its_job(base_url: str, store: JobStore, files: FileStore) -> None:
    async with working(store, files):
        async with websockets.connect(socket_url(base_url)) as socket:
            await socket.send(json.dumps({"prompt": "endless"}))
            await running(store)
        job = await ended(store)
    assert job.state is JobState.CANCELLED


async def test_json_and_msgpack_on_one_connection_each_answered_in_kind(base_url: str, store: JobStore, files: FileStore) -> None:
    traced = {"traceparent": TRACEPARENT}
    connecting = websockets.connect(socket_url(base_url), additional_headers=traced)
    async with working(store, files, 0.01), connecting as socket:
        await socket.send(json.dumps({"prompt": "x", "seed": 1, "request_id": "a"}))
        text = json.loads(await socket.recv())
        assert (text["seed"], text["request_id"], text["video"]["content_type"]) == (1, "a", "video/mp4")
        assert json.loads(await socket.recv())["action"] == "timings"
        await socket.send(msgpack.packb({"prompt": "x", "seed": 2, "request_id": 5}))
        binary = msgpack.unpackb(await socket.recv())
        assert (binary["seed"], binary["request_id"]) == (2, 5)
        assert binary["video"]["url"].startswith(base_url)
    assert (await ended(store)).traceparent == TRACEPARENT


NONSENSE = {
    "nothing": b"",
    "no type of msgpack": b"\xc1",
    "a list that claims 4 billion items": b"\xdd\xff\xff\xff\xff",
    "a map that claims 2 billion items": b"\xdf\x7f\xff\xff\xff",
    "3000 nested lists": b"\x91" * 3000,
    "a list": msgpack.packb([1]),
    "a map of numbers": msgpack.packb({1: 2}),
    "bytes that are no text": msgpack.packb({"prompt": b"\xff"}),
    "a timestamp": msgpack.packb({"prompt": msgpack.Timestamp(1)}),
    "2000 items": msgpack.packb({"prompt": list(range(2000))}),
    "a million items in small lists": msgpack.packb({"prompt": [[[1] * 10] * 500] * 200}),
    "a million lists in a list of lists": b"\x81\xa1a" + b"\xdc\x03\xe8" * 500,
    "a long text that is no file": msgpack.packb({"prompt": '"' * 1_000_000}),
    "a long text that is no file, in JSON": json.dumps({"prompt": '"' * 1_000_000}),
    "no text": "",
    "half an object": "{",
    "a list in JSON": "[]",
    "100,000 nested lists": "[" * 100_000,
    "50,000 fields": '{"prompt": 1' + ',"a":1' * 50_000 + "}",
}


@pytest.mark.parametrize("frame", NONSENSE.values(), ids=NONSENSE)
async def test_nonsense_is_an_error_in_band_and_the_connection_lives(wire: Wire, base_url: str, frame: bytes | str) -> None:
    async with websockets.connect(socket_url(base_url)) as socket:
        for _ in range(2):
            await socket.send(frame)
            async with asyncio.timeout(PATIENCE_S):
                error = json.loads(await socket.recv())
            assert (error["type"], error["status"] in (400, 413, 422)) == ("x-fal-error", True)


async def test_of_many_requests_the_newest_is_answered(wire: Wire, base_url: str, store: JobStore, files: FileStore) -> None:
    began = time.monotonic()
    async with working(store, files), websockets.connect(socket_url(base_url)) as socket:
        for seed in range(50):
            await socket.send(msgpack.packb({"prompt": "x", "seed": seed}))
        seeds = [await seed_of_next(socket)]
        while seeds[-1] != 49:
            seeds.append(await seed_of_next(socket))
    assert len(seeds) <= 4 + 5 * (time.monotonic() - began)  # a job takes 0.2 s
    assert len(await store.recent(100)) == len(seeds)


async def test_a_caller_may_have_more_of_them_buffered(wire: Wire, base_url: str, store: JobStore, files: FileStore) -> None:
    async with working(store, files, 0.01), websockets.connect(socket_url(base_url, "?max_buffering=60")) as socket:
        for seed in range(8):
            await socket.send(msgpack.packb({"prompt": "x", "seed": seed}))
        assert [await seed_of_next(socket) for _ in range(8)] == list(range(8))


@pytest.mark.parametrize("pack", [msgpack.packb, json.dumps], ids=["msgpack", "JSON"])
async def test_a_large_picture_becomes_a_file_of_the_job(
    base_url: str, store: JobStore, files: FileStore, pack: Callable[[Any], bytes | str], tmp_path: Path
) -> None:
    picture = f"data:image/png;base64,{base64.b64encode(bytes(3_000_000)).decode()}"
    async with websockets.connect(socket_url(base_url)) as socket:
        await socket.send(pack({"prompt": "x", "keyframe_0_image_url": picture, "keyframe_0_index": 0}))
        await running_or_waiting(store, 1)
        claim = await store.claims.take([ENDPOINT], LEASE_S)
    assert claim is not None
    name = claim.input["keyframe_0_image_url"].removeprefix(KEPT)
    await files.copy(name, tmp_path / "picture")
    assert (tmp_path / "picture").read_bytes() == bytes(3_000_000)


async def test_messages_that_wait_have_room_together(settings: Settings, store: JobStore) -> None:
    """However many connections there are: `max_bodies_bytes` bounds them."""
    app = create_app(settings.model_copy(update={"max_bodies_bytes": 8_000_000}), store)
    picture = f"data:image/png;base64,{base64.b64encode(bytes(2_000_000)).decode()}"
    frame = msgpack.packb({"prompt": "x", "keyframe_0_image_url": picture, "keyframe_0_index": 0})
    async with listening(app) as url:
        async with websockets.connect(socket_url(url)) as one, websockets.connect(socket_url(url)) as other:
            await one.send(frame)
            await running_or_waiting(store, 1)
            await other.send(frame)
            await running_or_waiting(store, 2)
            await other.send(frame)
            async with asyncio.timeout(PATIENCE_S):
                error = json.loads(await other.recv())
            assert (error["type"], error["status"]) == ("x-fal-error", 429)
        async with asyncio.timeout(PATIENCE_S):
            while app.state.bodies._large._free != 6_000_000:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def running_or_waiting(store: JobStore, jobs: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while len(await store.recent(9)) < jobs:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_websocket_that_hangs_up_while_its_job_is_being_stored_cancels_it(
    wire: Wire, base_url: str, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, submit = asyncio.Event(), store.submit

    async def slow(new: NewJob) -> Job:
        began.set()
        await asyncio.sleep(0.3)
        return await submit(new)

    monkeypatch.setattr(store, "submit", slow)
    async with websockets.connect(socket_url(base_url)) as socket:
        await socket.send(json.dumps({"prompt": "endless"}))
        await began.wait()
    assert (await ended(store)).state is JobState.CANCELLED


async def test_no_log_shows_a_token(settings: Settings, store: JobStore, caplog: pytest.LogCaptureFixture) -> None:
    hide_queries()
    log = logging.getLogger("uvicorn.error")
    async with listening(create_app(settings, store)) as url:
        log.setLevel(logging.INFO)
        log.addHandler(caplog.handler)
        async with websockets.connect(socket_url(url, "?fal_jwt_token=hush")):
            pass
        with pytest.raises(InvalidStatus):
            await websockets.connect(socket_url(url, "?fal_jwt_token=hush&max_buffering=0"))
    log.removeHandler(caplog.handler)
    assert "connection closed" in caplog.text or "Shutting down" in caplog.text, "it has logged other things"
    assert "hush" not in caplog.text


async def seed_of_next(socket: websockets.ClientConnection) -> int:
    async with asyncio.timeout(PATIENCE_S):
        while isinstance(frame := await socket.recv(), str):
            pass
    seed: int = msgpack.unpackb(frame)["seed"]
    return seed


async def test_an_idle_connection_is_ended_as_fal_does(wire: Wire, base_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.ingress.realtime.IDLE_S", 0.1)
    async with websockets.connect(socket_url(base_url)) as socket:
        assert json.loads(await socket.recv())["error"] == "TIMEOUT"
        with pytest.raises(ConnectionClosed):
            await socket.recv()
        assert socket.close_code == 1000


@pytest.mark.parametrize("query", ["?max_buffering=0", "?max_buffering=61", "?max_buffering=x", "?max_buffering="])
async def test_a_bad_buffer_is_refused(wire: Wire, base_url: str, query: str) -> None:
    with pytest.raises(InvalidStatus) as caught:
        await websockets.connect(socket_url(base_url, query))
    assert caught.value.response.status_code == 400
    assert b"max_buffering" in caught.value.response.body


async def test_another_sites_page_opens_no_websocket(wire: Wire, base_url: str) -> None:
    with pytest.raises(InvalidStatus) as caught:
        await websockets.connect(socket_url(base_url), origin=websockets.Origin("https://evil.example"))
    assert caught.value.response.status_code == 403


@pytest.mark.parametrize("path", [RUN, f"{RUN}/stream"])
async def test_another_sites_picture_renders_nothing(wire: Wire, http: httpx.AsyncClient, store: JobStore, path: str) -> None:
    headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"}
    answer = await http.get(path, params={"prompt": "x"}, headers=headers)
    assert (answer.status_code, await store.recent(1)) == (403, [])


async def test_keys_and_tokens_of_websockets(settings: Settings, store: JobStore, files: FileStore) -> None:
    secret = await store.keys.create("studio")
    closed = settings.model_copy(update={"auth": "keys", "quotas": QuotaSettings(open_streams=1)})
    async with listening(create_app(closed, store)) as url, working(store, files, 0.01):
        with pytest.raises(InvalidStatus) as caught:
            await websockets.connect(socket_url(url))
        assert caught.value.response.status_code == 401
        async with websockets.connect(socket_url(url, "?fal_jwt_token=nonsense")) as socket:
            assert json.loads(await socket.recv()) == {"status": "error", "error": "Unauthorized"}
        async with httpx.AsyncClient(headers={"authorization": f"Key {secret}"}, timeout=PATIENCE_S) as http:
            token = (await http.post(f"{url}/rest/tokens/", json={"allowed_apps": [ENDPOINT]})).json()
        async with websockets.connect(socket_url(url, f"?fal_jwt_token={token}")) as socket:
            await socket.send(json.dumps({"prompt": "x", "seed": 3}))
            assert json.loads(await socket.recv())["seed"] == 3
            await socket.recv()
            with pytest.raises(InvalidStatus) as caught:  # as many as the key may have
                await websockets.connect(socket_url(url), additional_headers={"authorization": f"Key {secret}"})
            assert caught.value.response.status_code == 429
            await store.keys.revoke(secret.partition(":")[0])
            await asyncio.sleep(2.1)  # a process may remember a secret for so long
            await socket.send(json.dumps({"prompt": "x"}))
            assert json.loads(await socket.recv()) == {"status": "error", "error": "Unauthorized"}
    assert len(await store.recent(9)) == 1


async def test_a_direct_call_that_takes_too_long_is_told_where_its_output_will_be(
    settings: Settings, store: JobStore, files: FileStore
) -> None:
    impatient = settings.model_copy(update={"run_timeout_s": 0.2})
    async with (
        listening(create_app(impatient, store)) as url,
        httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as http,
        working(store, files),
    ):
        answer = await http.post(RUN, json={"prompt": "slow", "seed": 4})
        assert (answer.status_code, answer.headers["x-fal-request-timeout-type"]) == (504, "user")  # so no client repeats it
        assert answer.headers["x-fal-request-id"] in answer.json()["detail"]
        job = await ended(store)
    assert (job.state, str(job.id)) == (JobState.SUCCEEDED, answer.headers["x-fal-request-id"])
