import asyncio
import email.policy as policy
import json
import pickle
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from email.parser import BytesParser
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest
from fastapi import FastAPI

from deployments.files.file_store import FileStore
from deployments.ingress.app import create_app
from deployments.ingress.routes import queue_routes, service_routes
from deployments.ingress.target_routing import TargetRouting
from deployments.jobs.database import StoreAway, StoreRefused
from deployments.jobs.job import Claim, Job, NewJob
from deployments.jobs.keys import Scope
from deployments.jobs.store import JobStore
from deployments.schemas.endpoint import ENDPOINTS
from deployments.schemas.failures import error_failure, request_failure
from deployments.settings import QueueSettings, Settings
from engines.controlnext.config import ControlNeXtConfig
from engines.errors import InternalError, RunnerFailed
from tests.conftest import execute
from tests.patience import PATIENCE_S

ENDPOINT = "fal-ai/animatediff-sparsectrl-lcm"
SUBMIT = f"/queue/{ENDPOINT}"
LEASE_S = 30.0
NOWHERE = "postgresql://postgres@127.0.0.1:1/nobody"
"""No database listens at this address."""
INPUT = {"prompt": "a city at night"}
MEDIA = {"image_url": "https://a.example/i.png", "video_url": "https://a.example/v.mp4"}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path, max_body_bytes=10_000, queue=QueueSettings(max_attempts=7))


@pytest.fixture
def app(settings: Settings, store: JobStore) -> FastAPI:
    return create_app(settings, store)


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with calling(app) as client:
        yield client


@pytest.fixture
async def alone(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """Calls an ingress without a store, for requests that must be answered without it."""
    async with calling(create_app(settings, NOWHERE)) as client:
        yield client


def calling(app: FastAPI, base_url: str = "http://localhost:8000", **headers: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url=base_url, headers=headers)


@pytest.fixture
def submissions(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> list[NewJob]:
    """The submissions that the ingress passed to the store."""
    seen: list[NewJob] = []
    submit = store.submit

    async def watched(new: NewJob) -> Job:
        seen.append(new)
        return await submit(new)

    monkeypatch.setattr(store, "submit", watched)
    return seen


async def submitted(client: httpx.AsyncClient) -> dict[str, Any]:
    response = await client.post(SUBMIT, json=INPUT)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


async def claimed(store: JobStore) -> Claim:
    claim = await store.claims.take([ENDPOINT], LEASE_S)
    assert claim is not None
    return claim


# Submit


async def test_submit_answers_where_to_follow_the_job(client: httpx.AsyncClient, store: JobStore) -> None:
    response = await client.post(SUBMIT, json=INPUT)
    body = response.json()
    url = f"http://localhost:8000/queue/{ENDPOINT}/requests/{body['request_id']}"
    assert body == {
        "status": "IN_QUEUE",
        "request_id": body["request_id"],
        "gateway_request_id": body["request_id"],
        "queue_position": 0,
        "logs": None,
        "metrics": {},
        "response_url": url,
        "status_url": f"{url}/status",
        "cancel_url": f"{url}/cancel",
    }
    assert response.headers["x-fal-request-id"] == body["request_id"]
    assert await store.get(UUID(body["request_id"])) is not None
    assert (await client.post(SUBMIT, json=INPUT)).json()["queue_position"] == 1


async def test_what_the_caller_left_open_is_drawn_once(client: httpx.AsyncClient, submissions: list[NewJob]) -> None:
    await client.post(SUBMIT, json=INPUT)
    [new] = submissions
    assert new.endpoint == ENDPOINT
    assert new.owner is None
    assert new.input["prompt"] == INPUT["prompt"]
    assert isinstance(new.input["seed"], int)
    assert None not in new.input.values()


@pytest.mark.parametrize(
    ("headers", "query", "expected"),
    [
        ({}, {}, {"priority": 0, "start_timeout_s": None, "max_attempts": 7, "webhook_url": None}),
        ({"X-Fal-Queue-Priority": "normal"}, {}, {"priority": 0}),
        ({"x-fal-queue-priority": "low"}, {}, {"priority": 1}),
        ({"X-Fal-Request-Timeout": "30"}, {}, {"start_timeout_s": 30.0}),
        ({"X-Fal-Request-Timeout": "30.0"}, {}, {"start_timeout_s": 30.0}),
        ({"X-Fal-No-Retry": "1"}, {}, {"max_attempts": 1}),
        ({"X-Fal-No-Retry": "Yes"}, {}, {"max_attempts": 1}),
        ({"X-Fal-No-Retry": "0"}, {}, {"max_attempts": 7}),
        ({}, {"fal_webhook": "https://h.example/w?x=1"}, {"webhook_url": "https://h.example/w?x=1"}),
        ({}, {"fal_webhook": ""}, {"webhook_url": None}),
        ({}, {"fal_max_queue_length": "0"}, {}),
        ({"X-Fal-Runner-Hint": "lora:a", "X-Fal-Store-IO": "0", "x-app-fal-disable-fallback": "1"}, {}, {}),
        ({}, {}, {"files_s": None, "store_io": True}),
        ({"X-Fal-Store-IO": "0"}, {}, {"store_io": False}),
        ({"X-Fal-Store-IO": "1"}, {}, {"store_io": True}),
        ({"X-Fal-Object-Lifecycle-Preference": '{"expiration_duration_seconds":3600}'}, {}, {"files_s": 3600.0}),
        (
            {"X-Fal-Object-Lifecycle-Preference": '{"initial_acl":{"default":"forbid"}}'},
            {},
            {"files_s": None, "files_access": {"default": "forbid", "rules": []}},
        ),
        (
            {"X-Fal-Object-Lifecycle-Preference": '{"initial_acl":{"rules":[{"user":"a","decision":"hide"}]}}'},
            {},
            {"files_access": {"default": "allow", "rules": [{"user": "a", "decision": "hide"}]}},
        ),
        ({"X-Fal-Object-Lifecycle-Preference": '{"initial_acl":{"default":"allow"}}'}, {}, {"files_access": None}),
    ],
)
async def test_submit_options(
    headers: dict[str, str],
    query: dict[str, str],
    expected: dict[str, Any],
    client: httpx.AsyncClient,
    submissions: list[NewJob],
) -> None:
    response = await client.post(SUBMIT, json=INPUT, headers=headers, params=query)
    assert response.status_code == 200
    assert {name: getattr(submissions[0], name) for name in expected} == expected


@pytest.mark.parametrize(
    ("headers", "query"),
    [
        ({"X-Fal-Queue-Priority": "urgent"}, {}),
        *(
            ({"X-Fal-Object-Lifecycle-Preference": value}, {})
            for value in (
                "",
                "{",
                "[]",
                "7",
                *(f'{{"expiration_duration_seconds":{n}}}' for n in ("0", "-1", "true", '"1d"', "NaN")),
            )
        ),
        *(({"X-Fal-Request-Timeout": value}, {}) for value in ("soon", "0", "-1", "nan", "inf", "1e300", "")),
        *(
            ({}, {"fal_webhook": url})
            for url in ("ftp://h.example/", "h.example", "http://", "file:///etc/passwd", "http://a\0b/")
        ),
        *(({}, {"fal_max_queue_length": value}) for value in ("-1", "many", "1.5", "", "٣")),
    ],
)
async def test_bad_options_are_bad_requests(headers: dict[str, str], query: dict[str, str], alone: httpx.AsyncClient) -> None:
    response = await alone.post(SUBMIT, json=INPUT, headers=headers, params=query)
    assert response.status_code == 400
    assert response.json()["error_type"] == response.headers["x-fal-error-type"] == "bad_request"


@pytest.mark.parametrize(
    ("body", "loc", "type_"),
    [
        (b"", ["body", "prompt"], "missing"),
        (b"{}", ["body", "prompt"], "missing"),
        (b'{"prompt": 1}', ["body", "prompt"], "string_type"),
        (b'{"prompt": "x", "seed": -2}', ["body", "seed"], "greater_than_equal"),
        (b'{"prompt": "x", "guidance_scale": NaN}', ["body", "guidance_scale"], "less_than_equal"),
        (b'{"prompt": "x", "guidance_scale": Infinity}', ["body", "guidance_scale"], "less_than_equal"),
        (b'{"prompt": "x", "num_inference_steps": 1e999}', ["body", "num_inference_steps"], "finite_number"),
        (b"[]", ["body"], "model_type"),
        (b'"prompt"', ["body"], "model_type"),
        (b"{", ["body"], "json_invalid"),
        (b"\xff", ["body"], "json_invalid"),
    ],
)
async def test_invalid_input_is_refused_with_its_place(body: bytes, loc: list[str], type_: str, alone: httpx.AsyncClient) -> None:
    response = await alone.post(SUBMIT, content=body)
    assert response.status_code == 422
    [fault] = response.json()["detail"]
    assert (fault["loc"], fault["type"]) == (loc, type_)
    assert response.headers["x-fal-needs-retry"] == "0"


async def test_unknown_fields_are_named_in_the_answer_and_in_the_log(client: httpx.AsyncClient) -> None:
    response = await client.post(SUBMIT, json=INPUT | {"duration": "5", "größe": 1})
    assert response.headers["x-reelray-ignored-fields"] == "duration, gr%C3%B6%C3%9Fe"
    status = (await client.get(response.json()["status_url"], params={"logs": "1"})).json()
    [line] = status["logs"]
    assert (line["level"], line["seq"]) == ("WARN", 1)
    assert line["message"].endswith("duration, größe")
    assert "x-reelray-ignored-fields" not in (await client.post(SUBMIT, json=INPUT)).headers


@pytest.mark.parametrize(
    ("headers", "ignored"),
    [
        ({"x-fal-queue-priority": "normal", "x-fal-no-retry": "1", "x-fal-store-io": "0"}, None),
        ({"x-fal-runner-hint": "lora:a", "x-app-fal-disable-fallback": "1"}, "x-app-fal-disable-fallback, x-fal-runner-hint"),
        ({"x-fal-retry-config": '{"timeout": {"retries": 0}}'}, None),
        ({"x-fal-retry-config": '{"timeout": {"retries": 0}, "weather": {"retries": 1}}'}, "x-fal-retry-config%3A%20weather"),
        ({"x-fal-retry-config": '{"server_error": 3}'}, "x-fal-retry-config%3A%20server_error"),
        ({"x-fal-retry-config": "[[["}, "x-fal-retry-config"),
        ({"x-fal-retry-config": '{"timeout": {"retries": 3}}', "x-fal-no-retry": "true"}, "x-fal-retry-config"),
    ],
)
async def test_headers_without_effect_are_named_in_the_answer(
    headers: dict[str, str], ignored: str | None, client: httpx.AsyncClient
) -> None:
    answer = await client.post(SUBMIT, json=INPUT, headers=headers)
    assert (answer.status_code, answer.headers.get("x-reelray-ignored-headers")) == (200, ignored)


async def test_unknown_fields_are_refused_where_the_operator_says_so(settings: Settings) -> None:
    async with calling(create_app(settings.model_copy(update={"unknown_fields": "refuse"}), NOWHERE)) as client:
        response = await client.post(SUBMIT, json=INPUT | {"duration": 5, "colour": -1})
    assert [(d["loc"], d["type"]) for d in response.json()["detail"]] == [
        (["body", "duration"], "extra_forbidden"),
        (["body", "colour"], "extra_forbidden"),
    ]


async def test_strange_text_is_kept_as_it_is(client: httpx.AsyncClient, store: JobStore) -> None:
    response = await client.post(SUBMIT, content=rb'{"prompt": "nul \u0000 and \ud83d\ude00"}')
    assert response.status_code == 200
    assert (await claimed(store)).input["prompt"] == "nul \0 and \U0001f600"


async def test_invalid_input_with_a_webhook_is_a_job_that_ended(client: httpx.AsyncClient) -> None:
    response = await client.post(SUBMIT, json={}, params={"fal_webhook": "https://h.example/"})
    assert response.status_code == 200
    links = response.json()
    assert links["status"] == "IN_QUEUE"
    status = await client.get(links["status_url"])
    assert (status.status_code, status.json()["status"], status.json()["error_type"]) == (200, "COMPLETED", "missing")
    result = await client.get(links["response_url"])
    assert result.status_code == 422
    assert result.json()["detail"][0]["loc"] == ["body", "prompt"]


async def test_a_full_queue_is_told(client: httpx.AsyncClient) -> None:
    limited = {"fal_max_queue_length": "1"}
    for _ in range(2):  # with none and then one job waiting, both are accepted
        assert (await client.post(SUBMIT, json=INPUT, params=limited)).status_code == 200
    full = await client.post(SUBMIT, json=INPUT, params=limited)
    assert (full.status_code, full.json()["error_type"]) == (429, "queue_full")


KEYED = {"Idempotency-Key": "render 7"}


async def test_a_repeat_under_its_key_is_answered_with_the_same_job(client: httpx.AsyncClient, store: JobStore) -> None:
    bodies = (b'{"prompt": "x", "seed": 1}', b'{"seed":1, "prompt":"x"}')
    first, again = [await client.post(SUBMIT, content=body, headers=KEYED) for body in bodies]
    assert again.json() == first.json()
    assert again.headers["x-fal-request-id"] == first.json()["request_id"]
    assert await store.queued(ENDPOINT) == 1


async def test_a_key_given_with_another_body_is_an_error_that_no_client_retries(client: httpx.AsyncClient) -> None:
    assert (await client.post(SUBMIT, json=INPUT, headers=KEYED)).status_code == 200
    other = await client.post(SUBMIT, json={**INPUT, "seed": 1}, headers=KEYED)
    assert (other.status_code, other.json()["error_type"]) == (422, "idempotency_key_reused")
    assert other.headers["x-fal-error-type"] == "idempotency_key_reused"
    elsewhere = await client.post("/queue/fal-ai/controlnext", json=MEDIA, headers=KEYED)
    assert elsewhere.json()["error_type"] == "idempotency_key_reused"


async def test_equal_submissions_without_a_key_are_two_jobs(client: httpx.AsyncClient) -> None:
    assert (await submitted(client))["request_id"] != (await submitted(client))["request_id"]


@pytest.mark.parametrize("key", [b"", b"k" * 256, b"a\x01b", b"a\x7fb", b"a\x85b"])
async def test_a_bad_key_is_a_bad_request(key: bytes, alone: httpx.AsyncClient) -> None:
    response = await alone.post(SUBMIT, json=INPUT, headers=[(b"Idempotency-Key", key)])
    assert (response.status_code, response.json()["error_type"]) == (400, "bad_request")


async def test_a_key_of_255_characters_is_a_good_one(client: httpx.AsyncClient) -> None:
    assert (await client.post(SUBMIT, json=INPUT, headers={"Idempotency-Key": "k" * 255})).status_code == 200


async def test_an_input_that_was_refused_does_not_use_up_its_key(client: httpx.AsyncClient) -> None:
    assert (await client.post(SUBMIT, json={}, headers=KEYED)).status_code == 422
    assert (await client.post(SUBMIT, json=INPUT, headers=KEYED)).status_code == 200


async def test_a_refused_input_with_a_webhook_does_not_use_up_its_key(client: httpx.AsyncClient) -> None:
    hook = {"fal_webhook": "https://h.example/"}
    refused, again = [await client.post(SUBMIT, json={}, headers=KEYED, params=hook) for _ in range(2)]
    assert refused.json()["request_id"] == again.json()["request_id"]
    mended = await client.post(SUBMIT, json=INPUT, headers=KEYED, params=hook)
    assert mended.status_code == 200
    assert mended.json()["request_id"] != refused.json()["request_id"]


async def test_a_repeat_is_never_told_that_the_queue_is_full(client: httpx.AsyncClient) -> None:
    limited = {"fal_max_queue_length": "0"}
    first, again = [await client.post(SUBMIT, json=INPUT, headers=KEYED, params=limited) for _ in range(2)]
    assert (again.status_code, again.json()["request_id"]) == (200, first.json()["request_id"])
    assert (await client.post(SUBMIT, json=INPUT, params=limited)).status_code == 429


async def test_a_body_at_the_limit_passes_and_one_above_does_not(client: httpx.AsyncClient) -> None:
    padding = 10_000 - len(json.dumps(INPUT))
    at_limit = json.dumps(INPUT) + " " * padding
    assert (await client.post(SUBMIT, content=at_limit)).status_code == 200
    above = await client.post(SUBMIT, content=at_limit + " ")
    assert (above.status_code, above.json()["error_type"]) == (413, "bad_request")


async def test_a_body_that_hides_its_size_is_not_read_to_its_end(client: httpx.AsyncClient) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1000
            yield b" " * 1000

    assert (await client.post(SUBMIT, content=endless())).status_code == 413
    assert sent <= 12_000


async def test_a_body_that_never_ends_is_given_up(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.ingress.body.BODY_TIMEOUT_S", 0.1)

    async def stalling() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(60)

    response = await client.post(SUBMIT, content=stalling())
    assert (response.status_code, response.json()["error_type"]) == (400, "bad_request")


async def test_an_endpoint_that_is_left_out_is_not_served(settings: Settings, store: JobStore) -> None:
    async with calling(create_app(settings.model_copy(update={"animatediff": None}), store)) as client:
        assert (await client.post(SUBMIT, json=INPUT)).status_code == 404


# Status, result, cancel


async def test_logs_are_there_when_asked_for(client: httpx.AsyncClient) -> None:
    links = await submitted(client)
    for query, expected in (("?logs=1", []), ("?logs=true", []), ("?logs=0", None), ("?logs=false", None), ("", None)):
        assert (await client.get(links["status_url"] + query)).json()["logs"] == expected


async def test_a_job_from_queue_to_result(client: httpx.AsyncClient, store: JobStore) -> None:
    links = await submitted(client)
    await submitted(client)
    request_id = links["request_id"]

    async def status() -> tuple[int, dict[str, Any]]:
        response = await client.get(links["status_url"], params={"logs": "1"})
        assert response.headers["x-fal-request-id"] == request_id
        return response.status_code, response.json()

    urls = {name: links[name] for name in ("request_id", "response_url", "status_url", "cancel_url")}
    assert await status() == (202, {"status": "IN_QUEUE", "queue_position": 0, "logs": [], "metrics": {}, **urls})

    claim = await claimed(store)
    assert await status() == (202, {"status": "IN_PROGRESS", "logs": [], "metrics": {}, **urls})
    early = await client.get(links["response_url"])
    assert early.status_code == 400
    assert early.json()["detail"] == "Request is still in progress"
    assert early.headers["x-fal-request-id"] == request_id

    await store.claims.log(claim, "step 1/4")
    code, body = await status()
    [line] = body["logs"]
    assert (code, line["message"], line["level"], line["source"], line["seq"]) == (202, "step 1/4", "INFO", "USER", 1)
    assert line["labels"] == {"level": "INFO", "source": "USER"}
    assert "progress" not in line
    assert line["timestamp"].endswith("+00:00")

    await store.claims.succeed(claim, {"video": {"url": "/files/x/video.mp4"}, "seed": 1}, {"inference_time": 2.5})
    code, body = await status()
    assert (code, body) == (200, {"status": "COMPLETED", "logs": [line], "metrics": {"inference_time": 2.5}, **urls})
    result = await client.get(links["response_url"])
    assert result.status_code == 200
    assert result.headers["content-type"] == "application/json"
    assert result.headers["x-fal-request-id"] == request_id
    assert result.json() == {"video": {"url": "http://localhost:8000/files/x/video.mp4"}, "seed": 1}
    for alias in (f"{links['response_url']}/response", f"http://localhost:8000{SUBMIT}/sub/path/requests/{request_id}"):
        assert (await client.get(alias)).json() == result.json()


async def test_a_failed_job_answers_its_failure(client: httpx.AsyncClient, store: JobStore) -> None:
    links = await submitted(client)
    await store.claims.fail(await claimed(store), error_failure(RunnerFailed("The GPU is on fire.")), {"inference_time": 1.0})
    status = (await client.get(links["status_url"])).json()
    assert (status["status"], status["error"], status["error_type"]) == (
        "COMPLETED",
        "The GPU is on fire.",
        "runner_server_error",
    )
    result = await client.get(links["response_url"])
    assert result.status_code == 500
    assert result.json() == {"detail": "The GPU is on fire.", "error_type": "runner_server_error"}
    assert result.headers["x-fal-error-type"] == "runner_server_error"


async def test_cancel(client: httpx.AsyncClient, store: JobStore) -> None:
    queued, running = await submitted(client), await submitted(client)

    response = await client.put(queued["cancel_url"], content=b"", headers={"content-type": "application/json"})
    assert (response.status_code, response.json()) == (202, {"status": "CANCELLATION_REQUESTED"})
    status = await client.get(queued["status_url"])
    assert (status.status_code, status.json()["error_type"]) == (200, "client_cancelled")
    result = await client.get(queued["response_url"])
    assert (result.status_code, result.json()["error_type"]) == (499, "client_cancelled")
    again = await client.put(queued["cancel_url"])  # as after a lost answer
    assert (again.status_code, again.json()) == (202, {"status": "CANCELLATION_REQUESTED"})
    assert (await client.get(queued["status_url"])).json()["metrics"] == {"inference_time": None}

    claim = await claimed(store)
    assert (await client.put(running["cancel_url"])).status_code == 202
    assert (await client.get(running["status_url"])).json()["status"] == "IN_PROGRESS"
    await store.claims.cancel(claim)
    assert (await client.get(running["response_url"])).status_code == 499


@pytest.mark.parametrize(("method", "ending"), [("GET", "/status"), ("GET", "/status/stream"), ("GET", ""), ("PUT", "/cancel")])
async def test_an_unknown_request_is_not_found(method: str, ending: str, client: httpx.AsyncClient) -> None:
    for request_id in (str(uuid4()), "not-a-uuid", "%00", "é"):
        response = await client.request(method, f"{SUBMIT}/requests/{request_id}{ending}")
        assert (response.status_code, response.json()) == (404, {"status": "NOT_FOUND"})
        assert UUID(response.headers["x-fal-request-id"])


async def test_a_request_is_not_found_under_another_app(client: httpx.AsyncClient) -> None:
    request_id = (await submitted(client))["request_id"]
    for app_id in ("fal-ai/controlnext", "other/animatediff-sparsectrl-lcm", "fal-ai", f"workflows/{ENDPOINT}"):
        assert (await client.get(f"/queue/{app_id}/requests/{request_id}/status")).status_code == 404


async def test_a_namespaced_endpoint_keeps_its_namespace_and_loses_its_path(
    settings: Settings, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = replace(ENDPOINTS[ENDPOINT], id="workflows/me/flow/sub/path")
    monkeypatch.setattr(queue_routes, "ENDPOINTS", {endpoint.id: endpoint})
    async with calling(create_app(settings, store)) as client:
        links = (await client.post("/queue/workflows/me/flow/sub/path", json=INPUT)).json()
        assert links["status_url"].startswith("http://localhost:8000/queue/workflows/me/flow/requests/")
        assert (await client.get(links["status_url"])).status_code == 202


# Status stream


async def events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


async def test_stream_of_a_job_that_ended_is_one_event(client: httpx.AsyncClient, store: JobStore) -> None:
    links = await submitted(client)
    claim = await claimed(store)
    await store.claims.log(claim, "one")
    await store.claims.log(claim, "two")
    await store.claims.succeed(claim, {}, {})
    response = await client.get(links["status_url"] + "/stream", params={"logs": "1"})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-fal-request-id"] == links["request_id"]
    [event] = [event async for event in events(response)]
    assert event["status"] == "COMPLETED"
    assert [item["message"] for item in event["logs"]] == ["one", "two"]


async def test_stream_without_logs_says_null(client: httpx.AsyncClient, store: JobStore) -> None:
    links = await submitted(client)
    await store.claims.succeed(await claimed(store), {}, {})
    [event] = [event async for event in events(await client.get(links["status_url"] + "/stream"))]
    assert event["logs"] is None


@pytest.mark.parametrize("trouble", [StoreAway, asyncpg.QueryCanceledError, KeyError])
async def test_stream_outlives_every_error(
    client: httpx.AsyncClient, store: JobStore, monkeypatch: pytest.MonkeyPatch, trouble: type[Exception]
) -> None:
    links = await submitted(client)
    await store.claims.succeed(await claimed(store), {}, {})
    get, reads = store.get, list[UUID]()

    async def away_then_back(job_id: UUID, lines_after: int | None = None) -> Job | None:
        reads.append(job_id)
        if len(reads) == 2:
            raise trouble
        return await get(job_id, lines_after)

    monkeypatch.setattr(store, "get", away_then_back)
    response = await client.get(links["status_url"] + "/stream")
    assert response.text.startswith(":")
    assert [event["status"] async for event in events(response)] == ["COMPLETED"]


# Three ways to address the queue


async def test_proxy_takes_the_target_as_a_route(client: httpx.AsyncClient, submissions: list[NewJob]) -> None:
    target = f"https://queue.fal.run/{ENDPOINT}?fal_webhook=https%3A%2F%2Fh.example%2Fw%3Fx%3D1"
    response = await client.post("/api/fal/proxy?ignored=1", json=INPUT, headers={"x-fal-target-url": target})
    assert response.status_code == 200
    assert submissions[0].webhook_url == "https://h.example/w?x=1"
    base = f"/{ENDPOINT}/requests/{response.json()['request_id']}"
    assert response.json()["status_url"] == f"http://localhost:8000/queue{base}/status"  # readable without the proxy header
    status = await client.get("/api/fal/proxy", headers={"x-fal-target-url": f"https://queue.fal.run{base}/status?logs=1"})
    assert (status.status_code, status.json()["logs"]) == (202, [])


@pytest.mark.parametrize(
    "target",
    [
        None,
        "",
        "not a url",
        "https://example.com/",
        "https://queue.fal.run.evil.example/x",
        "https://queue.fal.run@evil.example/x",
        "https://evil.example/queue.fal.run",
        "file://queue.fal.run/etc/passwd",
        "//queue.fal.run/x",
        "https://[queue.fal.run/x",
    ],
)
async def test_proxy_refuses_every_other_target(target: str | None, alone: httpx.AsyncClient) -> None:
    headers = {} if target is None else {"x-fal-target-url": target}
    response = await alone.get("/api/fal/proxy", headers=headers)
    assert (response.status_code, response.json()) == (400, "Invalid request")
    assert UUID(response.headers["x-fal-request-id"])


@pytest.mark.parametrize("target", ["https://fal.run/fal-ai/no-such-model", "https://rest.fal.ai/no/such/path"])
async def test_parts_that_are_not_served_are_not_found(target: str, alone: httpx.AsyncClient) -> None:
    response = await alone.post("/api/fal/proxy", json=INPUT, headers={"x-fal-target-url": target})
    assert (response.status_code, response.json()["error_type"]) == (404, "not_found")


@pytest.mark.parametrize(
    ("host", "path", "prefixed"),
    [
        ("fal.run", f"/{ENDPOINT}", f"/run/{ENDPOINT}"),
        ("falrun.com", f"/{ENDPOINT}/stream", f"/run/{ENDPOINT}/stream"),
        ("queue.fal.run", f"/{ENDPOINT}", f"/queue/{ENDPOINT}"),
        ("queue.falrun.com:443", f"/{ENDPOINT}", f"/queue/{ENDPOINT}"),
        ("rest.fal.ai", "/tokens/", "/rest/tokens/"),
        ("rest.alpha.fal.ai", "/tokens/realtime", "/rest/tokens/realtime"),
        ("v3.fal.media", "/files/upload", "/cdn/files/upload"),
        ("v3.fal.media", "/files/upload/multipart", "/cdn/files/upload/multipart"),
        ("v3.fal.media", "/files/abc/video.mp4", "/files/abc/video.mp4"),
        ("127.0.0.1:8000", f"/run/{ENDPOINT}", f"/run/{ENDPOINT}"),
        ("fal.run.evil.example", f"/{ENDPOINT}", f"/{ENDPOINT}"),
    ],
)
@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_each_of_fals_hosts_is_a_prefix(host: str, path: str, prefixed: str, kind: str) -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["path"])

    scope = {"type": kind, "path": path, "headers": [(b"host", host.encode())]}
    await TargetRouting(app)(scope, None, None)  # type: ignore[arg-type]
    assert seen == [prefixed]


@pytest.mark.parametrize("authority", ["queue.fal.run", "queue.fal.run:8443", "Queue.Fal.Run"])
async def test_host_says_queue_and_the_urls_stay_under_it(authority: str, app: FastAPI) -> None:
    async with calling(app, base_url="https://queue.fal.run", host=authority) as client:
        body = (await client.post(f"/{ENDPOINT}", json=INPUT)).json()
        assert body["status_url"] == f"https://{authority}/{ENDPOINT}/requests/{body['request_id']}/status"
        assert (await client.get(f"/{ENDPOINT}/requests/{body['request_id']}/status")).status_code == 202


async def test_files_are_served_under_the_queue_host_too(app: FastAPI, settings: Settings) -> None:
    kept = await FileStore(settings.files_url).put("video.mp4", b"hello", "video/mp4")
    async with calling(app, base_url="https://queue.fal.run") as client:
        assert (await client.get(kept.path)).content == b"hello"


async def test_public_url_wins_over_what_the_caller_used(settings: Settings, store: JobStore) -> None:
    public = settings.model_copy(update={"public_url": "https://video.example/"})
    async with calling(create_app(public, store)) as client:
        links = await submitted(client)
        assert links["status_url"].startswith(f"https://video.example/queue/{ENDPOINT}/requests/")
        await store.claims.succeed(await claimed(store), {"video": {"url": "/files/x/video.mp4"}}, {})
        result = await client.get(f"{SUBMIT}/requests/{links['request_id']}")
        assert result.json() == {"video": {"url": "https://video.example/files/x/video.mp4"}}


async def test_under_a_route_prefix(settings: Settings, store: JobStore) -> None:
    transport = httpx.ASGITransport(app=create_app(settings, store), root_path="/video")
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        target = {"x-fal-target-url": f"https://queue.fal.run/{ENDPOINT}"}
        links = (await client.post("/video/api/fal/proxy", json=INPUT, headers=target)).json()
        assert links["status_url"].startswith("http://localhost/video/queue/")
        assert (await client.get(links["status_url"])).status_code == 202


# Keys


async def test_keys_keep_callers_apart(settings: Settings, store: JobStore) -> None:
    app = create_app(settings.model_copy(update={"auth": "keys"}), store)
    one, other = await store.keys.create("one"), await store.keys.create("other")
    async with calling(app) as client:
        for refused in ({}, {"authorization": "Key wrong"}, {"authorization": f"Basic {one}"}, {"authorization": "Key"}):
            response = await client.post(SUBMIT, json=INPUT, headers=refused)
            assert (response.status_code, response.json()["error_type"]) == (401, "unauthorized")
        response = await client.post(SUBMIT, json=INPUT, headers={"authorization": f"Key {one}"})
        assert response.status_code == 200
        links = response.json()
        for method, url in (("GET", links["status_url"]), ("GET", links["response_url"]), ("PUT", links["cancel_url"])):
            assert (await client.request(method, url)).status_code == 401
            foreign = await client.request(method, url, headers={"authorization": f"Key {other}"})
            assert (foreign.status_code, foreign.json()) == (404, {"status": "NOT_FOUND"})
        own = await client.get(links["status_url"], headers={"authorization": f"Bearer {one}"})
        assert own.status_code == 202
        assert (await client.get("/health")).status_code == 200


@pytest.fixture
async def closed(settings: Settings, store: JobStore) -> AsyncIterator[httpx.AsyncClient]:
    """Calls an ingress that requires keys."""
    async with calling(create_app(settings.model_copy(update={"auth": "keys"}), store)) as client:
        yield client


def bearing(secret: str) -> dict[str, str]:
    return {"authorization": f"Key {secret}"}


def is_forbidden(response: httpx.Response) -> bool:
    assert response.status_code != 403 or response.json()["error_type"] == response.headers["x-fal-error-type"] == "forbidden"
    return response.status_code == 403


async def changed_scopes(scope: str, connection: Any) -> Any:
    return await connection.fetch("UPDATE api_keys SET scopes = ARRAY[$1]", scope)


async def test_a_key_does_what_its_scopes_say(closed: httpx.AsyncClient, store: JobStore) -> None:
    secret = await store.keys.create("both")
    links = (await closed.post(SUBMIT, json=INPUT, headers=bearing(secret))).json()
    status, stream, response = links["status_url"], f"{links['status_url']}/stream", links["response_url"]
    reads = [("GET", status), ("GET", stream), ("GET", response), ("GET", "/webhooks/deliveries")]
    writes = [("POST", SUBMIT), ("PUT", links["cancel_url"])]
    for scope, allowed, refused in (("submit", writes, reads), ("read", reads, writes)):
        await store.database.run(partial(changed_scopes, scope))
        store.keys._known.clear()
        for method, url in refused:
            assert is_forbidden(await closed.request(method, url, headers=bearing(secret))), (scope, method, url)
        for method, url in allowed:
            if url != stream:  # the stream would last until the job ends
                assert not is_forbidden(await closed.request(method, url, headers=bearing(secret))), (scope, method, url)


@pytest.mark.parametrize("scope", Scope)
async def test_a_job_out_of_reach_is_unknown_whatever_the_scopes(
    scope: Scope, closed: httpx.AsyncClient, store: JobStore
) -> None:
    mine, other = await store.keys.create("mine"), await store.keys.create("other", scopes=[scope])
    links = (await closed.post(SUBMIT, json=INPUT, headers=bearing(mine))).json()
    for method, url in (("GET", links["status_url"]), ("GET", links["response_url"]), ("PUT", links["cancel_url"])):
        foreign = await closed.request(method, url, headers=bearing(other))
        assert foreign.status_code != 404 if scope == "admin" else foreign.json() == {"status": "NOT_FOUND"}


async def test_an_admin_reads_every_job_and_cancels_if_it_may_submit(closed: httpx.AsyncClient, store: JobStore) -> None:
    mine = await store.keys.create("mine")
    reader, operator = await store.keys.create("r", scopes=["admin"]), await store.keys.create("o", scopes=["admin", "submit"])
    links = (await closed.post(SUBMIT, json=INPUT, headers=bearing(mine))).json()
    assert (await closed.get(links["status_url"], headers=bearing(reader))).status_code == 202
    assert is_forbidden(await closed.put(links["cancel_url"], headers=bearing(reader)))
    assert is_forbidden(await closed.post(SUBMIT, json=INPUT, headers=bearing(reader)))
    assert (await closed.put(links["cancel_url"], headers=bearing(operator))).status_code == 202
    assert (await closed.get(links["status_url"], headers=bearing(mine))).json()["error_type"] == "client_cancelled"


async def test_a_rotated_key_keeps_its_jobs(closed: httpx.AsyncClient, store: JobStore) -> None:
    old = await store.keys.create("studio")
    links = (await closed.post(SUBMIT, json=INPUT, headers=bearing(old))).json()
    new = await store.keys.rotate(old.partition(":")[0], 3600)
    assert new is not None
    for secret in (old, new):
        assert (await closed.get(links["status_url"], headers=bearing(secret))).status_code == 202
    assert await store.keys.rotate(old.partition(":")[0], 0) is not None
    for secret in (old, new):
        assert (await closed.get(links["status_url"], headers=bearing(secret))).status_code == 401


# Every answer


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("GET", "/queue/", 404), ("GET", SUBMIT, 405), ("POST", SUBMIT + "/x", 404), ("POST", "/run/x", 404)],
)
async def test_router_errors_are_in_fals_shape_and_never_redirects(
    method: str, path: str, status: int, alone: httpx.AsyncClient
) -> None:
    response = await alone.request(method, path)
    assert response.status_code == status
    assert set(response.json()) == {"detail", "error_type"}
    assert UUID(response.headers["x-fal-request-id"])


async def test_a_wrong_path_is_told_the_right_one(alone: httpx.AsyncClient) -> None:
    for path in (f"/{ENDPOINT}", "/queue/animatediff-sparsectrl-lcm"):
        assert f"Submit with POST to {SUBMIT};" in (await alone.post(path)).json()["detail"]
    unlike = (await alone.post("/v1/videos")).json()["detail"]
    assert all(f"/queue/{endpoint}" in unlike for endpoint in ENDPOINTS)


async def test_a_slash_at_the_end_of_a_submission_is_no_mistake(client: httpx.AsyncClient) -> None:
    assert (await client.post(f"{SUBMIT}/", json=INPUT)).status_code == 200


async def test_our_own_mistakes_say_nothing(client: httpx.AsyncClient, store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*args: object, **kwargs: object) -> None:
        raise KeyError("password of 10.0.0.5")

    monkeypatch.setattr(store, "get", broken)
    response = await client.get(f"{SUBMIT}/requests/{uuid4()}/status", headers={"origin": "http://localhost:3000"})
    assert (response.status_code, response.json()["error_type"]) == (500, "internal_error")
    assert "10.0.0.5" not in response.text
    assert UUID(response.headers["x-fal-request-id"])
    assert response.headers["access-control-allow-origin"] == "http://localhost:3000"


async def test_an_outage_is_told_as_one(client: httpx.AsyncClient, store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(*args: object, **kwargs: object) -> None:
        raise StoreAway("10.0.0.5:5432")

    monkeypatch.setattr(store, "get", away)
    monkeypatch.setattr(store, "check", away)
    for path in (f"{SUBMIT}/requests/{uuid4()}/status", "/health"):
        response = await client.get(path)
        assert (response.status_code, response.json()["error_type"]) == (503, "internal_error")
        assert "10.0.0.5" not in response.text
        assert UUID(response.headers["x-fal-request-id"])


async def test_a_time_limit_of_something_else_is_no_outage_of_the_database(
    client: httpx.AsyncClient, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slow(*args: object, **kwargs: object) -> None:
        raise TimeoutError("the object store did not answer")

    monkeypatch.setattr(store, "get", slow)
    assert (await client.get(f"{SUBMIT}/requests/{uuid4()}/status")).status_code == 500


async def test_health_is_bad_after_a_submission_failed_until_one_succeeds(
    client: httpx.AsyncClient, store: JobStore, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.jobs.database.RIDE_OUT_S", 0.1)
    await execute(
        database,
        """
        CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE SQLSTATE '53100'; END$$;
        CREATE TRIGGER full_disk BEFORE INSERT ON jobs EXECUTE FUNCTION full_disk();
        """,
    )
    assert (await client.post(SUBMIT, json=INPUT)).status_code == 500
    assert (await client.get("/health")).status_code == 503
    await execute(database, "DROP TRIGGER full_disk ON jobs")
    assert (await client.post(SUBMIT, json=INPUT)).status_code == 200
    assert (await client.get("/health")).status_code == 200


async def test_health_does_not_wait_for_ever(client: httpx.AsyncClient, store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    async def hung(*args: object, **kwargs: object) -> None:
        await asyncio.sleep(60)

    monkeypatch.setattr(store, "check", hung)
    monkeypatch.setattr(service_routes, "HEALTH_TIMEOUT_S", 0.05)
    assert (await client.get("/health")).status_code == 503


@pytest.mark.parametrize("origin", ["http://localhost:3000", "http://127.0.0.1", "https://localhost", "http://[::1]:8080"])
async def test_browsers_on_this_machine_may_call(origin: str, alone: httpx.AsyncClient) -> None:
    preflight = await alone.options(
        "/api/fal/proxy",
        headers={
            "origin": origin,
            "access-control-request-method": "PUT",
            "access-control-request-headers": "authorization,content-type,x-fal-target-url",
        },
    )
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == origin
    assert "x-fal-target-url" in preflight.headers["access-control-allow-headers"]
    assert "PUT" in preflight.headers["access-control-allow-methods"]
    assert UUID(preflight.headers["x-fal-request-id"])
    actual = await alone.get("/nowhere", headers={"origin": origin})
    exposed = {"x-fal-request-id", "x-fal-request-timeout-type", "x-fal-error-type", "x-fal-needs-retry"}
    exposed |= {"x-fal-runner-hints", "x-fal-billable-units", "x-reelray-ignored-fields", "x-reelray-ignored-headers"}
    exposed |= {"content-range", "content-disposition", "etag", "x-reelray-trace-id"}
    assert set(actual.headers["access-control-expose-headers"].split(", ")) == exposed


@pytest.mark.parametrize(("allowed", "readers"), [(None, {"studio", "other"}), (("https://studio.example",), {"studio"})])
async def test_with_keys_pages_read_from_any_origin_or_from_those_allowed(
    allowed: tuple[str, ...] | None, readers: set[str], settings: Settings
) -> None:
    keyed = settings.model_copy(update={"auth": "keys", "allowed_origins": allowed})
    async with calling(create_app(keyed, NOWHERE)) as client:
        for page in ("studio", "other"):
            origin = {"origin": f"https://{page}.example"}
            asked = {"access-control-request-method": "POST", "access-control-request-headers": "content-type,x-fal-no-retry"}
            preflight = await client.options(SUBMIT, params={"fal_jwt_token": "x"}, headers=origin | asked)
            answer = await client.get("/nowhere", headers=origin)
            for response in (preflight, answer):
                granted = response.headers.get("access-control-allow-origin") in ("*", origin["origin"])
                assert granted is (page in readers)
            assert preflight.is_success is (page in readers)


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:8000", "10.0.0.7.evil.example", "door", "[", "a@b:c"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
async def test_an_open_service_answers_to_its_own_names_only(method: str, host: str, alone: httpx.AsyncClient) -> None:
    for path in ("/webhooks/deliveries", "/health", "/openapi.json"):
        assert (await alone.request(method, path, headers={"host": host})).status_code == 403


async def test_a_service_on_the_network_that_was_told_its_name_answers_to_no_other(settings: Settings) -> None:
    named = settings.model_copy(update={"open_to_network": True, "public_url": "http://door:8000"})
    async with calling(create_app(named, NOWHERE)) as client:
        for host, status in {"evil.example": 403, "door": 200, "10.0.0.7:8000": 200}.items():
            assert (await client.get("/openapi.json", headers={"host": host})).status_code == status


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "http://localhost.evil.example", "null", "http://localhost:80@evil.example"]
)
async def test_other_pages_may_not_read(origin: str, alone: httpx.AsyncClient) -> None:
    assert "access-control-allow-origin" not in (await alone.get("/nowhere", headers={"origin": origin})).headers


async def test_a_strangers_page_submits_nothing_to_an_open_service(client: httpx.AsyncClient, store: JobStore) -> None:
    page = {"origin": "https://evil.example", "content-type": "text/plain"}  # a browser sends this without a preflight request
    rebound = {
        "origin": "http://door:8000",
        "host": "door:8000",
    }  # DNS rebinding: the page's own host name resolves to the service
    for headers in (page, rebound, {"origin": "null"}, {"origin": ""}, {"origin": "http://localhost.evil.example"}):
        for path, target in ((SUBMIT, {}), ("/api/fal/proxy", {"x-fal-target-url": f"https://queue.fal.run/{ENDPOINT}"})):
            assert is_forbidden(await client.post(path, json=INPUT, headers=headers | target))
        assert is_forbidden(await client.put(f"{SUBMIT}/requests/{uuid4()}/cancel", headers=headers))
        assert is_forbidden(await client.post("/rest/tokens/", headers=headers))
    assert await store.queued(ENDPOINT) == 0
    assert (await client.get("/health", headers=page)).status_code == 200


@pytest.mark.parametrize(
    ("settings_of", "origin", "host"),
    [
        ({}, "http://localhost:3000", "127.0.0.1:8000"),
        ({}, "http://127.0.0.1:8000", "127.0.0.1:8000"),  # fal's client in a page that the service itself serves
        ({}, None, "localhost:8000"),
        ({}, None, "[::1]:8000"),
        ({}, None, "10.0.0.7"),  # no name, so nobody can have pointed it here
        ({"public_url": "https://Video.Example:443/fal"}, "https://video.example", "video.example"),
        ({"allowed_origins": ("https://studio.example",)}, "https://studio.example", "localhost:8000"),
        ({"open_to_network": True}, "http://door:8000", "door:8000"),
        ({"open_to_network": True}, "https://door", "door"),
        ({"open_to_network": True, "public_url": "http://door:8000"}, "http://door:8000", "door:8000"),
        ({"auth": "keys"}, "https://studio.example", "door:8000"),  # a page has no key unless it was given one
    ],
)
async def test_these_pages_may_submit(
    settings_of: dict[str, Any], origin: str | None, host: str, settings: Settings, store: JobStore
) -> None:
    headers = {"x-fal-target-url": f"https://queue.fal.run/{ENDPOINT}", "host": host} | ({"origin": origin} if origin else {})
    headers |= bearing(await store.keys.create("studio"))
    async with calling(create_app(settings.model_copy(update=settings_of), store)) as client:
        assert (await client.post("/api/fal/proxy", json=INPUT, headers=headers)).status_code == 200


async def test_a_service_open_to_the_network_still_refuses_strangers_pages(settings: Settings) -> None:
    async with calling(create_app(settings.model_copy(update={"open_to_network": True}), NOWHERE)) as client:
        assert is_forbidden(await client.post(SUBMIT, json=INPUT, headers={"origin": "https://evil.example"}))


async def test_openapi_describes_the_endpoint(alone: httpx.AsyncClient) -> None:
    document = (await alone.get("/openapi.json")).json()
    schema = document["paths"][SUBMIT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "prompt" in document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]["properties"]


# Files


@pytest.fixture
async def video(settings: Settings) -> str:
    return (await FileStore(settings.files_url).put("video.mp4", b"0123456789", "video/mp4")).path


async def test_a_file_is_shown_but_never_run(video: str, alone: httpx.AsyncClient) -> None:
    response = await alone.get(video)
    assert (response.status_code, response.content) == (200, b"0123456789")
    assert response.headers["content-type"] == "video/mp4"
    assert response.headers["content-length"] == "10"
    assert response.headers["content-disposition"] == 'inline; filename="video.mp4"'
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in response.headers["content-security-policy"]
    assert response.headers["cache-control"] == "public, max-age=3600, immutable"  # files expire
    assert response.headers["accept-ranges"] == "bytes"


async def test_no_cache_keeps_a_file_longer_than_its_caller_wants(settings: Settings, alone: httpx.AsyncClient) -> None:
    files = FileStore(settings.files_url)
    name = files.new_name("video.mp4", "video/mp4", keep_s=60)
    response = await alone.get((await files.put("video.mp4", b"x", "video/mp4", name)).path)
    max_age = int(response.headers["cache-control"].removeprefix("public, max-age=").removesuffix(", immutable"))
    assert 50 < max_age <= 60


@pytest.mark.parametrize("auth", ["open", "keys"])
async def test_any_page_may_read_a_file_whose_url_it_knows(auth: str, video: str, settings: Settings) -> None:
    narrow = settings.model_copy(update={"auth": auth, "allowed_origins": ("https://studio.example",)})
    async with calling(create_app(narrow, NOWHERE)) as client:
        for headers in ({"range": "bytes=0-3"}, {}):
            response = await client.get(video, headers=headers | {"origin": "https://other.example"})
            assert response.headers.get_list("access-control-allow-origin") == ["*"]


async def test_what_a_browser_could_run_is_a_download(settings: Settings, alone: httpx.AsyncClient) -> None:
    kept = await FileStore(settings.files_url).put("page.html", b"<script>", "text/html")
    response = await alone.get(kept.path)
    assert response.headers["content-type"] == "application/octet-stream"
    assert response.headers["content-disposition"].startswith("attachment")


@pytest.mark.parametrize(
    ("asked", "status", "content", "content_range"),
    [
        ("bytes=0-3", 206, b"0123", "bytes 0-3/10"),
        ("bytes=4-", 206, b"456789", "bytes 4-9/10"),
        ("bytes=-3", 206, b"789", "bytes 7-9/10"),
        ("bytes=-30", 206, b"0123456789", "bytes 0-9/10"),
        ("bytes=8-100", 206, b"89", "bytes 8-9/10"),
        ("bytes=10-", 416, b"", "bytes */10"),
        ("bytes=-0", 416, b"", "bytes */10"),
        ("bytes=5-3", 200, b"0123456789", None),
        ("bytes=-", 200, b"0123456789", None),
        ("bytes=0-1,", 200, b"0123456789", None),
        ("bytes=0-4,3-5", 200, b"0123456789", None),
        ("bytes=20-, 4-5", 206, b"45", "bytes 4-5/10"),
        ("bytes=20-,30-40", 416, b"", "bytes */10"),
        ("bytes=" + ",".join(f"{i % 10}-{i % 10}" for i in range(40)), 200, b"0123456789", None),
        ("lines=0-1", 200, b"0123456789", None),
        ("bytes=a-b", 200, b"0123456789", None),
    ],
)
async def test_ranges(
    asked: str, status: int, content: bytes, content_range: str | None, video: str, alone: httpx.AsyncClient
) -> None:
    response = await alone.get(video, headers={"range": asked})
    assert (response.status_code, response.content) == (status, content)
    assert response.headers.get("content-range") == content_range


async def test_several_ranges_come_in_one_answer(video: str, alone: httpx.AsyncClient) -> None:
    response = await alone.get(video, headers={"range": "bytes=-2, 0-1,4-4"})
    assert response.status_code == 206
    assert response.headers["content-length"] == str(len(response.content))
    message = BytesParser(policy=policy.HTTP).parsebytes(
        b"content-type: " + response.headers["content-type"].encode() + b"\r\n\r\n" + response.content
    )
    parts = [(part["content-type"], part["content-range"], part.get_payload(decode=True)) for part in message.iter_parts()]
    assert parts == [
        ("video/mp4", "bytes 8-9/10", b"89"),
        ("video/mp4", "bytes 0-1/10", b"01"),
        ("video/mp4", "bytes 4-4/10", b"4"),
    ]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"if-none-match": "{etag}"}, 304),
        ({"if-none-match": 'W/{etag}, "other"'}, 304),
        ({"if-none-match": '"other", {etag}'}, 304),
        ({"if-none-match": "*"}, 304),
        ({"if-none-match": '"other"'}, 200),
        ({"if-none-match": "{etag}x"}, 200),
        ({"if-match": "{etag}"}, 200),
        ({"if-match": "*"}, 200),
        ({"if-match": '"other"'}, 412),
        ({"if-match": '"other"', "range": "bytes=0-1"}, 412),
        ({"if-none-match": "{etag}", "range": "bytes=0-1"}, 304),
        ({"if-range": "{etag}", "range": "bytes=0-1"}, 206),
        ({"if-range": "W/{etag}", "range": "bytes=0-1"}, 200),
        ({"if-range": "Wed, 21 Oct 2015 07:28:00 GMT", "range": "bytes=0-1"}, 200),
    ],
)
async def test_conditions(headers: dict[str, str], status: int, video: str, alone: httpx.AsyncClient) -> None:
    etag = (await alone.head(video)).headers["etag"]
    answer = await alone.get(video, headers={name: value.replace("{etag}", etag) for name, value in headers.items()})
    assert answer.status_code == status


async def test_a_range_of_another_version_is_not_mixed_in(video: str, alone: httpx.AsyncClient) -> None:
    etag = (await alone.get(video)).headers["etag"]
    for if_range, status in ((etag, 206), ('"other"', 200)):
        response = await alone.get(video, headers={"range": "bytes=0-3", "if-range": if_range})
        assert response.status_code == status


async def test_head_and_not_modified(video: str, alone: httpx.AsyncClient) -> None:
    head = await alone.head(video, headers={"range": "bytes=0-3"})
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", "10")
    assert head.headers["content-type"] == "video/mp4"
    known = await alone.get(video, headers={"if-none-match": head.headers["etag"]})
    assert (known.status_code, known.content) == (304, b"")


@pytest.mark.parametrize("name", ["", "x", "../secret", "..%2f..%2fsecret", "%2e%2e/secret", "0" * 32 + "/video.mp4", "%00", "."])
async def test_no_other_file_is_served(name: str, settings: Settings, alone: httpx.AsyncClient) -> None:
    (settings.home / "secret").write_text("secret")
    response = await alone.get(f"/files/{name}")
    assert response.status_code == 404
    assert UUID(response.headers["x-fal-request-id"])


async def test_no_checkpoint_is_served(settings: Settings, alone: httpx.AsyncClient) -> None:
    name = f"checkpoints/{uuid4()}"
    await FileStore(settings.files_url).put_checkpoint(name, "latents", b"latents")
    for asked in (name, f"{'0' * 32}/../{name}", name.replace("/", "%2F"), f"./{name}"):
        assert (await alone.get(f"/files/{asked}")).status_code == 404


# Starting the app


def test_importing_the_door_loads_neither_torch_nor_ray() -> None:
    code = "import sys, deployments.ingress.app; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_app_can_be_made_in_another_process(settings: Settings) -> None:
    factory: Callable[[], FastAPI] = pickle.loads(pickle.dumps(partial(create_app, settings, NOWHERE)))
    assert isinstance(factory(), FastAPI)


async def test_the_app_opens_and_closes_its_own_store(
    settings: Settings, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, closed = list[str](), list[bool]()

    async def open_store(url: str, *, upgrades: bool) -> JobStore:
        opened.append(url)
        return store

    async def close_store() -> None:
        closed.append(True)

    monkeypatch.setattr(JobStore, "open", open_store)
    monkeypatch.setattr(store, "close", close_store)
    app = create_app(settings, "postgresql://db/x")
    async with app.router.lifespan_context(app), calling(app) as client:
        assert (await client.get("/health")).status_code == 200
        assert closed == []
    assert (opened, closed) == (["postgresql://db/x"], [True])


async def test_an_app_that_starts_before_its_database_answers_503_until_that_is_there(
    settings: Settings, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = urlsplit(database)
    sockets = tmp_path / "sockets"  # the server's folder will be linked here
    monkeypatch.setattr("deployments.jobs.database.RIDE_OUT_S", 0.1)
    monkeypatch.setattr("deployments.ingress.app.START_S", 0.3)
    app = create_app(settings, url._replace(query=f"host={quote(str(sockets))}&port=5432").geturl())
    async with app.router.lifespan_context(app), calling(app) as client:
        assert (await client.get("/health")).status_code == 503
        assert (await client.post(f"/queue/{ENDPOINT}", json={"prompt": "a red ball"})).status_code == 503
        sockets.symlink_to(parse_qs(url.query)["host"][0])
        async with asyncio.timeout(PATIENCE_S):
            while (await client.get("/health")).status_code != 200:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        monkeypatch.setattr("deployments.jobs.database.RIDE_OUT_S", PATIENCE_S)
        assert (await client.post(f"/queue/{ENDPOINT}", json={"prompt": "a red ball"})).status_code == 200


async def test_a_database_that_refuses_the_door_is_told_in_the_log_and_tried_again(
    settings: Settings, store: JobStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refusals = [StoreRefused("a wrong password"), StoreRefused("a wrong password")]

    async def open_store(url: str, *, upgrades: bool) -> JobStore:
        if refusals:
            raise refusals.pop()
        return store

    monkeypatch.setattr("deployments.ingress.app.START_S", 0.01)
    monkeypatch.setattr("deployments.ingress.app.REFUSED_PAUSE_S", 0.05)
    monkeypatch.setattr(JobStore, "open", open_store)
    app = create_app(settings, NOWHERE)
    async with app.router.lifespan_context(app), calling(app) as client:
        assert (await client.get("/health")).status_code == 503
        async with asyncio.timeout(PATIENCE_S):
            while (await client.get("/health")).status_code != 200:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    told = [record.levelname for record in caplog.records if record.__dict__.get("action") == "store_refused"]
    assert told == ["CRITICAL", "CRITICAL"]


def test_the_error_of_an_outage_is_the_one_of_any_failure() -> None:
    assert request_failure(500, "internal_error", InternalError().message) == error_failure(InternalError())


async def test_what_can_never_fit_is_refused_when_it_is_submitted(settings: Settings, store: JobStore):
    small = settings.model_copy(update={"controlnext": ControlNeXtConfig(dtype="float16", memory_bytes=24_000_000_000)})
    async with calling(create_app(small, store)) as client:
        answer = await client.post("/queue/fal-ai/controlnext", json=MEDIA | {"decode_chunk_size": 32})
        assert (answer.status_code, answer.headers["X-Fal-Needs-Retry"]) == (422, "0")
        (detail,) = answer.json()["detail"]
        assert detail == {
            "loc": ["body", "decode_chunk_size"],
            "msg": "At 576x1024 the memory of this service's GPUs is enough for 14 frames together.",
            "type": "less_than_equal",
            "url": "https://docs.fal.ai/errors#less_than_equal",
            "ctx": {"le": 14},
        }
        assert (await client.post("/queue/fal-ai/controlnext", json=MEDIA | {"decode_chunk_size": 14})).status_code == 200


async def test_a_job_keeps_the_work_that_its_input_asks_for(client: httpx.AsyncClient, submissions: list[NewJob]):
    await client.post("/queue/fal-ai/controlnext", json=MEDIA)
    assert (submissions[0].units, submissions[0].parallel) == ((240.0, 650.0, 240.0), 26)
