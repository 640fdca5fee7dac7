"""What fal-client relies on: one rule a case, with the section of fal-queue-protocol.md that it is from."""

import asyncio
import base64
import hashlib
import json
import threading
import time
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any
from uuid import UUID, uuid4

import fal_client
import httpx
import httpx_sse
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from fal_client import Completed, FalClientHTTPError, FalClientTimeoutError, InProgress, Queued, SyncClient
from fal_client.client import RealtimeError
from websockets.exceptions import InvalidStatus

from tests.wire.cases.harness import CALLS, EVERYTHING, Given, rule

ANIMATEDIFF = "fal-ai/animatediff-sparsectrl-lcm"
CONTROLNEXT = "fal-ai/controlnext"
PEOPLE = {"image_url": "https://a.example/ref.png", "video_url": "https://a.example/dance.mp4"}
STEPS = ["step 1/4", "step 2/4", "step 3/4", "step 4/4"]
NOBODY = "00000000-0000-4000-8000-000000000000"
WITH_REST = ("P2", "P4")
"""Under P1 the client's calls to rest.fal.ai, for tokens, do not reach us."""

given: Given


def begin(this: Given) -> None:
    global given
    given = this
    warnings.simplefilter("ignore")


def key(who: str = "own") -> str:
    return given.keys[who] if given.keys else "anything"


@cache
def client(who: str = "own") -> SyncClient:
    return SyncClient(key=key(who))


def submitted(prompt: str, **options: Any) -> fal_client.SyncRequestHandle:
    return client().submit(ANIMATEDIFF, {"prompt": prompt, "seed": 42}, **options)


def until(handle: fal_client.SyncRequestHandle, kind: type) -> Any:
    while not isinstance(status := handle.status(with_logs=True), kind):
        time.sleep(0.1)
    return status


def status_of(handle: fal_client.SyncRequestHandle, **options: Any) -> Any:
    """Its status, whose fields depend on its class."""
    return handle.status(**options)


def done(prompt: str, **options: Any) -> fal_client.SyncRequestHandle:
    handle = submitted(prompt, **options)
    until(handle, Completed)
    return handle


def failure(call: Callable[[], object]) -> FalClientHTTPError:
    try:
        value = call()
    except FalClientHTTPError as exc:
        return exc
    raise AssertionError(f"no error but {value!r}")


def results_of(handle: fal_client.SyncRequestHandle) -> list[int]:
    """The codes of what was answered at the result's URL."""
    return [call.status_code for call in CALLS.get() if str(call.request.url) == handle.response_url]


def detail(error: FalClientHTTPError) -> Any:
    return error.message


# Submit.


@rule("2.1: a submission has an id and three URLs")
def submit_handle() -> None:
    handle = submitted("x")
    assert UUID(handle.request_id)
    assert handle.status_url == f"{handle.response_url}/status"
    assert handle.cancel_url == f"{handle.response_url}/cancel"


@rule("2.1: a handle that is rebuilt from the id equals the one of the submission")
def submit_handle_is_rebuilt() -> None:
    this = client()
    handle = this.submit(ANIMATEDIFF, {"prompt": "x"})
    assert this.get_handle(ANIMATEDIFF, handle.request_id) == handle


@rule("2.1: the answer is a 200 with the request's id in its header")
def submit_answer() -> None:
    handle = submitted("x")
    [call] = CALLS.get()
    assert (call.status_code, call.headers["x-fal-request-id"]) == (200, handle.request_id)


@rule("2.1: a start timeout comes as 30.0, a priority only if it is set, a hint")
def submit_options() -> None:
    submitted("x", start_timeout=30, priority="low", hint="lora:a")
    [call] = CALLS.get()
    assert call.request.headers["x-fal-request-timeout"] == "30.0"
    assert call.headers["x-reelray-ignored-headers"] == "x-fal-runner-hint"


@rule("2.1: the caller's own headers are taken")
def submit_headers() -> None:
    lifecycle = json.dumps({"expiration_duration_seconds": 3600})
    submitted("x", headers={"X-Fal-Store-IO": "0", "X-Fal-No-Retry": "1", "X-Fal-Object-Lifecycle-Preference": lifecycle})
    assert "x-reelray-ignored-headers" not in CALLS.get()[0].headers


@rule("2.1: a webhook's URL is in the query")
def submit_webhook() -> None:
    assert UUID(submitted("x", webhook_url="https://hook.example/w?x=1&y=2").request_id)


@rule("6.1: a wrong value raises at once, with its field, and is not repeated")
def submit_invalid() -> None:
    error = failure(lambda: client().submit(ANIMATEDIFF, {"prompt": "x", "num_inference_steps": 0}))
    assert (error.status_code, detail(error)[0]["loc"]) == (422, ["body", "num_inference_steps"])
    assert len(CALLS.get()) == 1


@rule("6.1: an empty input is told what it lacks")
def submit_empty() -> None:
    assert detail(failure(lambda: client().submit(CONTROLNEXT, {})))[1]["loc"] == ["body", "video_url"]


@rule("2.1: with a webhook the 422 comes with the result")
def submit_invalid_with_webhook() -> None:
    handle = client().submit(ANIMATEDIFF, {}, webhook_url="https://hook.example/")
    assert isinstance(handle.status(), Completed)
    assert failure(handle.get).status_code == 422


@rule("6.2: an unknown endpoint is a 404, not_found, and is not repeated")
def submit_unknown_endpoint() -> None:
    error = failure(lambda: client().submit("fal-ai/no-such-model", {}))
    assert (error.status_code, error.error_type, len(CALLS.get())) == (404, "not_found", 1)


@rule("ours: the same key and input are answered with the same request")
def submit_idempotency_key() -> None:
    headers = {"Idempotency-Key": str(uuid4())}
    assert submitted("x", headers=headers).request_id == submitted("x", headers=headers).request_id


@rule("2.6: another input under the same key is a 422, not a 409, on which the client repeats its call")
def submit_idempotency_key_reused() -> None:
    headers = {"Idempotency-Key": str(uuid4())}
    submitted("x", headers=headers)
    error = failure(lambda: submitted("y", headers=headers))
    assert (error.status_code, error.error_type) == (422, "idempotency_key_reused")


@rule("D18: fields that an endpoint does not have are ignored and named")
def submit_unknown_fields() -> None:
    client().submit(ANIMATEDIFF, {"prompt": "x", "duration": 5, "größe": 1})
    assert CALLS.get()[0].headers["x-reelray-ignored-fields"] == "duration, gr%C3%B6%C3%9Fe"


@rule("4: an encoded file is an ordinary string")
def submit_encoded() -> None:
    image = fal_client.encode(bytes(60_000), "image/png")
    handle = client().submit(ANIMATEDIFF, {"prompt": "x", "keyframe_0_image_url": image, "keyframe_0_index": 0})
    until(handle, Completed)
    assert handle.get()["video"]["file_size"] == 2060


@rule("4: a data URI that is no base64 is refused at once")
def submit_broken_data_uri() -> None:
    image = "data:image/png;base64," + "?" * 60_000
    job_input = {"prompt": "x", "keyframe_0_image_url": image, "keyframe_0_index": 0}
    error = failure(lambda: client().submit(ANIMATEDIFF, job_input))
    assert (error.status_code, detail(error)[0]["type"]) == (422, "file_download_error")


@rule("2.1: a retry config is taken, and what it cannot do is named")
def submit_retry_config() -> None:
    config = {"timeout": {"retries": 0}, "server_error": 3}
    submitted("x", headers={"X-Fal-Retry-Config": json.dumps(config)})
    assert CALLS.get()[0].headers["x-reelray-ignored-headers"] == "x-fal-retry-config%3A%20server_error"


@rule("6.2: a bad timeout header is a 400, bad_request")
def submit_bad_timeout() -> None:
    error = failure(lambda: submitted("x", headers={"X-Fal-Request-Timeout": "soon"}))
    assert (error.status_code, error.error_type) == (400, "bad_request")


@rule("2.1: submitting asynchronously is the same")
async def submit_async() -> None:
    handle = await fal_client.AsyncClient(key=key()).submit(ANIMATEDIFF, {"prompt": "x"})
    assert UUID(handle.request_id)


# Status.


@rule("2.2: IN_QUEUE has a position")
def status_queued() -> None:
    assert isinstance(until(submitted("held"), Queued).position, int)


@rule("2.2: IN_PROGRESS has logs if they are asked for, else null")
def status_in_progress() -> None:
    handle = submitted("endless")
    assert isinstance(until(handle, InProgress).logs, list)
    assert status_of(handle).logs is None
    handle.cancel()


@rule("2.2: COMPLETED has logs if they are asked for, else null, and the metrics")
def status_completed() -> None:
    handle = done("x")
    status = status_of(handle, with_logs=True)
    assert [item["message"] for item in status.logs] == STEPS
    assert isinstance(status.metrics["inference_time"], float)
    assert (status_of(handle).logs, status.error, status.error_type) == (None, None, None)


@rule("2.2: the code is 202 until it is completed, then 200")
def status_codes() -> None:
    submitted("held").status()
    assert CALLS.get()[-1].status_code == 202
    done("x").status()
    assert CALLS.get()[-1].status_code == 200


@rule("8: repeated statuses are equal")
def status_equal() -> None:
    handle = done("x")
    assert handle.status(with_logs=True) == handle.status(with_logs=True)


@rule("2.2: the status by endpoint and id is that of the handle")
def status_by_id() -> None:
    handle = done("x")
    assert client().status(ANIMATEDIFF, handle.request_id) == handle.status()


@rule("2.2: a failed request is COMPLETED with error and type")
def status_failed() -> None:
    status = status_of(done("fails RunnerFailed"))
    assert (status.error_type, bool(status.error)) == ("runner_server_error", True)


@rule("2.2: a log item has message, level, source and timestamp")
def status_log_item() -> None:
    item = status_of(done("x"), with_logs=True).logs[0]
    assert (item["message"], item["level"], item["source"]) == ("step 1/4", "INFO", "USER")
    assert item["timestamp"].endswith("+00:00")


@rule("2.2: an unknown id is a 404, which is not repeated")
def status_unknown() -> None:
    error = failure(lambda: client().status(ANIMATEDIFF, NOBODY))
    assert (error.status_code, len(CALLS.get())) == (404, 1)


@rule("1.1: a request is not found under another endpoint")
def status_other_endpoint() -> None:
    handle = submitted("held")
    assert failure(lambda: client().status(CONTROLNEXT, handle.request_id)).status_code == 404


@rule("2.6: iter_events yields until it is completed")
def status_events() -> None:
    seen = list(submitted("slow").iter_events(with_logs=True, interval=0.05))
    assert isinstance(seen[-1], Completed)
    assert any(isinstance(status, InProgress) for status in seen)


@rule("2.6: so it does asynchronously")
async def status_events_async() -> None:
    handle = await fal_client.AsyncClient(key=key()).submit(ANIMATEDIFF, {"prompt": "x"})
    seen: list[Any] = [status async for status in handle.iter_events(with_logs=True, interval=0.05)]
    assert [item["message"] for item in seen[-1].logs] == STEPS


# Result.


@rule("2.4: the result is the bare output")
def result_output() -> None:
    output = done("x").get()
    assert (output["seed"], set(output["video"])) == (42, {"url", "content_type", "file_name", "file_size"})


@rule("8: a result can be read again and by its id, and is equal")
def result_again() -> None:
    handle = done("x")
    assert handle.get() == handle.get() == client().result(ANIMATEDIFF, handle.request_id)


@rule("4: a file's URL needs no key")
def result_download() -> None:
    video = done("x").get()["video"]
    answer = httpx.get(video["url"])
    assert (answer.status_code, answer.headers["content-type"], len(answer.content)) == (200, "video/mp4", video["file_size"])


@rule("2.4: a result that is not there yet is a 400; the client itself waits for it")
def result_early() -> None:
    answer = httpx.get(submitted("held").response_url, headers={"authorization": f"Key {key()}"})
    assert (answer.status_code, answer.json()["detail"]) == (400, "Request is still in progress")


@rule("6.1: a model's error is a 422 with a list")
def result_model_error() -> None:
    error = failure(done("fails ImageLoadError").get)
    assert (error.status_code, detail(error)[0]["type"]) == (422, "image_load_error")


@rule("6.2: a runner's error has its type, and is not repeated")
def result_request_error() -> None:
    handle = done("fails RunnerFailed")
    error = failure(handle.get)
    assert (error.status_code, error.error_type) == (500, "runner_server_error")
    assert results_of(handle) == [500]


@rule("2.6: a result of 503 has our id and no nginx, so it is not repeated")
def result_503() -> None:
    handle = done("fails RunnerDisconnected")
    error = failure(handle.get)
    assert (error.status_code, error.error_type) == (503, "runner_disconnected")
    assert results_of(handle) == [503]


@rule("2.1: a start timeout is a 504 of type user")
def result_start_timeout() -> None:
    handle = submitted("held", start_timeout=1.1)
    until(handle, Completed)
    error = failure(lambda: client().result(ANIMATEDIFF, handle.request_id))
    assert (error.status_code, error.error_type) == (504, "request_timeout")
    assert error.response_headers["x-fal-request-timeout-type"] == "user"


@rule("2.1: a namespace-less path below the endpoint is followed at owner and alias")
def result_of_a_full_path() -> None:
    handle = done("x")
    answer = httpx.get(f"{handle.response_url}/response", headers={"authorization": f"Key {key()}"})
    assert answer.json()["seed"] == 42


# Subscribe.


@rule("0: the pages' inputs with subscribe, logs and a callback")
def subscribe_animatediff() -> None:
    printed: list[str] = []

    def on_queue_update(update: fal_client.Status) -> None:
        if isinstance(update, fal_client.InProgress):
            for log in update.logs or ():
                printed.append(log["message"])

    result = fal_client.SyncClient(key=key()).subscribe(
        "fal-ai/animatediff-sparsectrl-lcm",
        arguments={
            "prompt": "Drone footage, futuristic city at night, synthwave, vaporware, neon lights, highly detailed, masterpeice, "
            "high quality"
        },
        with_logs=True,
        on_queue_update=on_queue_update,
    )
    assert result["video"]["content_type"] == "video/mp4"
    assert printed


@rule("0: the same for controlnext")
def subscribe_controlnext() -> None:
    result = client().subscribe(
        "fal-ai/controlnext",
        arguments={
            "image_url": "https://storage.googleapis.com/falserverless/model_tests/musepose/ref.png",
            "video_url": "https://storage.googleapis.com/falserverless/model_tests/musepose/dance.mp4",
        },
    )
    assert result["video"]["content_type"] == "video/mp4"


@rule("2.6: subscribe asynchronously, with every line at the end")
async def subscribe_async() -> None:
    seen: list[Any] = []
    await fal_client.AsyncClient(key=key()).subscribe(ANIMATEDIFF, {"prompt": "x"}, with_logs=True, on_queue_update=seen.append)
    assert [item["message"] for item in seen[-1].logs] == STEPS


@rule("0: on_enqueue gets the id")
def subscribe_on_enqueue() -> None:
    ids: list[str] = []
    client().subscribe(ANIMATEDIFF, {"prompt": "x"}, on_enqueue=ids.append)
    assert UUID(ids[0])


@rule("6.3: a failed request runs through to COMPLETED, then raises")
def subscribe_failed() -> None:
    seen: list[Any] = []
    job_input = {"prompt": "fails ImageLoadError"}
    error = failure(lambda: client().subscribe(ANIMATEDIFF, job_input, on_queue_update=seen.append))
    assert (error.status_code, seen[-1].error_type) == (422, "image_load_error")


@rule("2.5: the client's timeout cancels the request")
def subscribe_timeout() -> None:
    try:
        client().subscribe(ANIMATEDIFF, {"prompt": "endless"}, client_timeout=4)
    except FalClientTimeoutError as exc:
        request_id = exc.request_id or ""
    ended = until(client().get_handle(ANIMATEDIFF, request_id), Completed).error_type
    assert ended in ("client_cancelled", "request_timeout")  # the latter if it had not begun by then: the client says its time


@rule("8: a hint and a priority are taken on subscribe")
def subscribe_options() -> None:
    assert client().subscribe(ANIMATEDIFF, {"prompt": "x", "seed": 3}, hint="a", priority="normal")["seed"] == 3


# Cancel.


@rule("2.5: a waiting request is cancelled; its result is a 499")
def cancel_queued() -> None:
    handle = submitted("held")
    handle.cancel()
    until(handle, Completed)
    error = failure(handle.get)
    assert (error.status_code, error.error_type) == (499, "client_cancelled")


@rule("9.3: a running request that is cancelled reaches COMPLETED")
def cancel_running() -> None:
    handle = submitted("endless")
    until(handle, InProgress)
    client().cancel(ANIMATEDIFF, handle.request_id)
    assert until(handle, Completed).error_type == "client_cancelled"


@rule("2.5: a repeated cancel is answered as the first")
def cancel_again() -> None:
    handle = submitted("held")
    handle.cancel()
    handle.cancel()


@rule("2.5: a completed request cannot be cancelled: 400")
def cancel_completed() -> None:
    assert failure(done("x").cancel).status_code == 400


@rule("2.5: an unknown request is a 404")
def cancel_unknown() -> None:
    assert failure(lambda: client().cancel(ANIMATEDIFF, NOBODY)).status_code == 404


# Run.


@rule("3: run answers the output")
def run_output() -> None:
    output = client().run(ANIMATEDIFF, {"prompt": "x", "seed": 5})
    assert (output["seed"], output["video"]["file_size"]) == (5, 2060)


@rule("3: so it does asynchronously, for the other endpoint")
async def run_async() -> None:
    assert (await fal_client.AsyncClient(key=key()).run(CONTROLNEXT, {**PEOPLE, "seed": 6}))["seed"] == 6


@rule("3: run takes hint, start timeout and headers")
def run_options() -> None:
    headers = {"X-Fal-No-Retry": "1"}
    assert client().run(ANIMATEDIFF, {"prompt": "x", "seed": 7}, hint="a", start_timeout=30, headers=headers)["seed"] == 7


@rule("issue 14: a run's job can be followed in the queue")
def run_is_a_job() -> None:
    client().run(ANIMATEDIFF, {"prompt": "x"})
    request_id = CALLS.get()[0].headers["x-fal-request-id"]
    assert isinstance(client().status(ANIMATEDIFF, request_id), Completed)


@rule("6.1: a run's wrong value is a 422, and is not repeated")
def run_invalid() -> None:
    assert failure(lambda: client().run(ANIMATEDIFF, {})).status_code == 422
    assert len(CALLS.get()) == 1


@rule("2.6: a run's 500 is not repeated")
def run_request_error() -> None:
    assert failure(lambda: client().run(ANIMATEDIFF, {"prompt": "fails RunnerFailed"})).error_type == "runner_server_error"
    assert len(CALLS.get()) == 1


@rule("3: a run's start timeout is a 504 that is not repeated")
def run_start_timeout() -> None:
    assert failure(lambda: client().run(ANIMATEDIFF, {"prompt": "held"}, start_timeout=1.1)).status_code == 504
    assert len(CALLS.get()) == 1


@rule("6.1: a path that an endpoint does not have is a 404")
def run_path() -> None:
    assert failure(lambda: client().run(ANIMATEDIFF, {"prompt": "x"}, path="/no/such")).status_code == 404


# Stream.


@rule("3: the last event is the complete output, those before have its shape and the progress")
def stream_events() -> None:
    seen = list(client().stream(ANIMATEDIFF, {"prompt": "x", "seed": 8}))
    assert (seen[-1]["seed"], seen[-1]["video"]["file_size"], seen[-1].get("partial")) == (8, 2060, None)
    assert all(event["partial"] and event["video"] is None and event["seed"] == 8 for event in seen[:-1])
    assert [event["progress"]["step"]["done"] for event in seen[1:-1]] == [1, 2, 3, 4]


@rule("8: at least two events, the last with a falsy partial")
async def stream_async() -> None:
    seen = [event async for event in fal_client.AsyncClient(key=key()).stream(ANIMATEDIFF, {"prompt": "x"})]
    assert len(seen) >= 2
    assert not seen[-1].get("partial")


@rule("3: an error before the stream raises")
def stream_invalid() -> None:
    try:
        list(client().stream(ANIMATEDIFF, {}))
    except httpx_sse.SSEError:  # about the content type: the client loses the rest
        return
    raise AssertionError("no error")


@rule("3: a stream whose job fails tells why, then breaks off")
def stream_fails() -> None:
    seen: list[Any] = []
    broke_off = False
    try:
        for event in client().stream(ANIMATEDIFF, {"prompt": "fails ImageLoadError"}):
            seen.append(event)
    except httpx.HTTPError:
        broke_off = True
    assert (broke_off, seen[-1]["status"], seen[-1]["detail"][0]["type"]) == (True, 422, "image_load_error")


# Realtime.


@rule("3: one connection, many requests, with the key")
def realtime_with_key() -> None:
    with client().realtime(ANIMATEDIFF, use_jwt=False) as connection:
        for seed in (1, 2, 3):
            connection.send({"prompt": "x", "seed": seed})
            assert received(connection)["seed"] == seed


@rule("3: the same with a token", only=WITH_REST)
def realtime_with_token() -> None:
    with client().realtime(ANIMATEDIFF) as connection:
        connection.send({"prompt": "x", "seed": 4, "request_id": "mine"})
        answer = received(connection)
        assert (answer["seed"], answer["request_id"]) == (4, "mine")


@rule("3: the same asynchronously, with a buffer", only=WITH_REST)
async def realtime_async() -> None:
    async with fal_client.AsyncClient(key=key()).realtime(ANIMATEDIFF, max_buffering=60) as connection:
        for seed in range(4):
            await connection.send({"prompt": "x", "seed": seed})
        seeds: list[int] = []
        while len(seeds) < 4:
            if (answer := await connection.recv()) is not None:
                seeds.append(answer["seed"])
        assert seeds == [0, 1, 2, 3]


@rule("3: an error raises RealtimeError, and the connection goes on")
def realtime_error() -> None:
    with client().realtime(ANIMATEDIFF, use_jwt=False) as connection:
        connection.send({"prompt": "x", "num_inference_steps": 0})
        try:
            raise AssertionError(f"no error but {received(connection)}")
        except RealtimeError as exc:
            error = exc
        assert (error.error, error.payload["status"]) == ("greater_than_equal", 422)
        connection.send({"prompt": "x", "seed": 5})
        assert received(connection)["seed"] == 5


@rule("3: of requests that come meanwhile the newest is answered")
def realtime_latest_wins() -> None:
    with client().realtime(ANIMATEDIFF, use_jwt=False) as connection:
        connection.send({"prompt": "slow", "seed": 0})
        time.sleep(0.2)
        for seed in range(1, 20):
            connection.send({"prompt": "x", "seed": seed})
        seeds = [received(connection)["seed"]]
        while seeds[-1] != 19:
            seeds.append(received(connection)["seed"])
        assert len(seeds) <= 10  # 2 on a machine that is not busy


@rule("3: the raw socket has no default path")
def realtime_raw_socket() -> None:
    with client().ws_connect(ANIMATEDIFF, path="/realtime", use_jwt=False) as socket:
        socket.send(json.dumps({"prompt": "x", "seed": 6}))
        assert json.loads(socket.recv())["seed"] == 6
        assert json.loads(socket.recv())["action"] == "timings"


@rule("3: an endpoint without realtime refuses the handshake")
def realtime_no_such_endpoint() -> None:
    for _ in range(5):
        assert refused("own", CONTROLNEXT) in (403, 404)


def refused(who: str, endpoint: str) -> int:
    """The code of a handshake that is refused."""
    try:
        with client(who).realtime(endpoint, use_jwt=False):
            pass
    except InvalidStatus as exc:
        return exc.response.status_code
    raise AssertionError("it was accepted")


def received(connection: fal_client.RealtimeConnection) -> dict[str, Any]:
    while (answer := connection.recv()) is None:
        pass
    return answer


# Keys and tokens.


@rule("3: a token is a bare JSON string", only=WITH_REST)
def token_bare_string() -> None:
    assert client()._get_realtime_token(ANIMATEDIFF).count(".") == 2


@rule("3: a token takes the place of the key", only=WITH_REST, with_keys=True)
def token_in_place_of_key() -> None:
    token = client()._get_realtime_token(ANIMATEDIFF)
    handle = submitted("held")
    assert httpx.get(handle.status_url, params={"fal_jwt_token": token}).status_code == 202
    assert httpx.get(handle.status_url).status_code == 401


@rule("6.2: a wrong key is a 401, which is not repeated", with_keys=True)
def key_wrong() -> None:
    error = failure(lambda: SyncClient(key="a:b").submit(ANIMATEDIFF, {"prompt": "x"}))
    assert (error.status_code, error.error_type, len(CALLS.get())) == (401, "unauthorized", 1)


@rule("ours: a key that may only read is a 403", with_keys=True)
def key_scope() -> None:
    assert failure(lambda: client("reader").submit(ANIMATEDIFF, {"prompt": "x"})).error_type == "forbidden"


@rule("ours: a key that may only read gets no realtime connection", with_keys=True)
def key_scope_realtime() -> None:
    assert refused("reader", ANIMATEDIFF) == 403


@rule("ours: another key's request is unknown", with_keys=True)
def key_of_another() -> None:
    handle = submitted("held")
    assert failure(lambda: client("other").status(ANIMATEDIFF, handle.request_id)).status_code == 404
    assert failure(lambda: client("other").cancel(ANIMATEDIFF, handle.request_id)).status_code == 404
    assert not isinstance(handle.status(), Completed)


@rule("6.2: a direct call without a good key is a 401", with_keys=True)
def key_wrong_run() -> None:
    assert failure(lambda: SyncClient(key="a:b").run(ANIMATEDIFF, {"prompt": "x"})).status_code == 401


# Webhooks, verified as fal's documentation has it in Python.


def delivered(prompt: str) -> tuple[str, dict[str, str], bytes]:
    path = f"/{uuid4().hex}"
    handle = submitted(prompt, webhook_url=given.hooks + path)
    answer = httpx.get(given.heard + path, timeout=60).json()
    return handle.request_id, answer["headers"], base64.b64decode(answer["body"])


def is_signed(headers: dict[str, str], body: bytes) -> bool:
    names = ("request-id", "user-id", "timestamp")
    message = "\n".join([*(headers[f"x-fal-webhook-{name}"] for name in names), hashlib.sha256(body).hexdigest()]).encode()
    for published in httpx.get(f"{given.base}/rest/.well-known/jwks.json").json()["keys"]:
        try:
            public = Ed25519PublicKey.from_public_bytes(base64.urlsafe_b64decode(published["x"]))
            public.verify(bytes.fromhex(headers["x-fal-webhook-signature"]), message)
        except Exception:  # as in the documentation, which goes on to the next key
            continue
        return True
    return False


@rule("5: the end of a request is told, signed by a published key")
def webhook_ok() -> None:
    request_id, headers, body = delivered("x")
    told = json.loads(body)
    assert (told["request_id"], told["status"], told["payload"]["seed"]) == (request_id, "OK", 42)
    assert is_signed(headers, body)
    assert not is_signed(headers, body + b" ")


@rule("5: a failure is told as the result would be")
def webhook_error() -> None:
    _, headers, body = delivered("fails RunnerFailed")
    told = json.loads(body)
    assert (told["status"], told["payload"]["error_type"]) == ("ERROR", "runner_server_error")
    assert is_signed(headers, body)


# Many at once.


@rule("9.15: ten waiting callers that poll ten times a second each get their own output")
def many_callers() -> None:
    seeds: list[int] = []

    def call(seed: int) -> None:
        seeds.append(client().subscribe(ANIMATEDIFF, {"prompt": "x", "seed": seed})["seed"])

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(seeds) == list(range(10))


@rule("9.15: so do ten in one loop")
async def many_callers_async() -> None:
    caller = fal_client.AsyncClient(key=key())
    outputs = await asyncio.gather(*(caller.run(ANIMATEDIFF, {"prompt": "x", "seed": seed}) for seed in range(10)))
    assert [output["seed"] for output in outputs] == list(range(10))


# What holds for all that was called above. These rules are checked last.


def ours() -> list[httpx.Response]:
    return [each for each in EVERYTHING if not str(each.request.url).startswith(given.heard)]


@rule("9.1: x-fal-request-id is on every answer")
def every_answer_has_an_id() -> None:
    assert [str(each.request.url) for each in ours() if "x-fal-request-id" not in each.headers] == []
    assert len(ours()) > len(given.rules)


@rule("9.11: nothing redirects: the asynchronous client does not follow")
def every_answer_is_direct() -> None:
    assert [each for each in ours() if 300 <= each.status_code < 400] == []


@rule("2.6: no answer has a code on which the client repeats a call that went through")
def every_code_is_safe() -> None:
    assert [each for each in ours() if each.status_code in (408, 409, 429)] == []
