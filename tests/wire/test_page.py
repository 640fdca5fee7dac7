"""The code from fal's endpoint page, with the client from npm, calls the app: recipe J1 of fal-queue-protocol.md."""

import asyncio
from collections.abc import Callable
from uuid import UUID, uuid4

import httpx
import pytest

from deployments.files.file_store import FileStore
from deployments.ingress.app import create_app
from deployments.jobs.job import Job, JobState, NewJob
from deployments.jobs.store import JobStore
from deployments.settings import Settings
from tests.wire.page import PageClient
from tests.wire.service import ENDPOINT, VIDEO, Wire, listening, working

INPUT = {"prompt": "Drone footage, futuristic city at night", "seed": 42}
STEPS = ["step 1/4", "step 2/4", "step 3/4", "step 4/4"]


async def test_subscribe_as_the_page_writes_it(page: PageClient, store: JobStore, files: FileStore, base_url: str) -> None:
    async with working(store, files, step_s=0.3):
        done = await page("subscribe", ENDPOINT, input=INPUT)
    assert done.error is None
    assert done.value["data"]["seed"] == 42
    video = done.value["data"]["video"]
    assert video == {"url": video["url"], "content_type": "video/mp4", "file_name": "video.mp4", "file_size": len(VIDEO)}
    async with httpx.AsyncClient() as client:
        assert (await client.get(video["url"])).content == VIDEO
    job = await store.get(UUID(done.value["requestId"]))
    assert job is not None
    assert job.state is JobState.SUCCEEDED
    assert "step 1/4" in done.printed
    last = done.updates[-1]
    assert last["status"] == "COMPLETED"
    assert [item["message"] for item in last["logs"]] == STEPS
    assert last["metrics"] == {"inference_time": 1.2}
    assert "IN_PROGRESS" in {update["status"] for update in done.updates}
    assert all(isinstance(update["logs"], list) for update in done.updates)


async def test_subscribe_in_streaming_mode_ends_with_every_line_once(page: PageClient, store: JobStore, files: FileStore) -> None:
    async with working(store, files):
        done = await page("subscribe", ENDPOINT, input=INPUT, mode="streaming")
    assert done.error is None
    assert done.value["data"]["seed"] == 42
    assert done.updates[-1]["status"] == "COMPLETED"
    assert [item["message"] for item in done.updates[-1]["logs"]] == STEPS


async def test_status_stream_events_carry_only_new_lines(page: PageClient, store: JobStore, files: FileStore, wire: Wire) -> None:
    submitted = await page("submit", ENDPOINT, input=INPUT)
    streaming = asyncio.create_task(page("streamStatus", ENDPOINT, requestId=submitted.value["request_id"], logs=True))
    await wire.answer("GET", "/status/stream")
    async with working(store, files):
        done = await streaming
    assert [item["message"] for update in done.updates for item in update["logs"]] == STEPS
    assert [item["progress"]["step"]["done"] for update in done.updates for item in update["logs"]] == [1, 2, 3, 4]
    assert [update["status"] for update in (done.updates[0], done.updates[-1])] == ["IN_QUEUE", "COMPLETED"]
    assert done.value["status"] == "COMPLETED"


async def test_submit_status_result(page: PageClient, store: JobStore, files: FileStore) -> None:
    submitted = await page("submit", ENDPOINT, input=INPUT, webhookUrl="https://example.com/hook?a=1&b=2", priority="low")
    request_id = submitted.value["request_id"]
    assert submitted.value["status"] == "IN_QUEUE"
    assert submitted.value["queue_position"] == 0

    waiting = await page("status", ENDPOINT, requestId=request_id, logs=True)
    assert (waiting.value["status"], waiting.value["logs"]) == ("IN_QUEUE", [])

    async with working(store, files, step_s=0.01):
        await page("streamStatus", ENDPOINT, requestId=request_id)
    status = await page("status", ENDPOINT, requestId=request_id, logs=True)
    assert status.value["status"] == "COMPLETED"
    assert [item["message"] for item in status.value["logs"]] == STEPS
    result = await page("result", ENDPOINT, requestId=request_id)
    assert result.value["requestId"] == request_id
    assert result.value["data"]["seed"] == 42


async def test_result_before_the_end_is_an_error_that_is_not_retried(page: PageClient, wire: Wire) -> None:
    request_id = (await page("submit", ENDPOINT, input=INPUT)).value["request_id"]
    early = await page("result", ENDPOINT, requestId=request_id)
    assert early.error is not None
    assert (early.error["name"], early.error["status"]) == ("ApiError", 400)
    assert early.error["body"]["detail"] == "Request is still in progress"
    assert early.error["requestId"] == request_id
    assert wire.count("GET", request_id) == 1


async def test_cancel_while_queued(page: PageClient) -> None:
    request_id = (await page("submit", ENDPOINT, input=INPUT)).value["request_id"]
    assert (await page("cancel", ENDPOINT, requestId=request_id)).error is None
    status = await page("status", ENDPOINT, requestId=request_id)
    assert (status.value["status"], status.value["error_type"]) == ("COMPLETED", "client_cancelled")
    result = await page("result", ENDPOINT, requestId=request_id)
    assert result.error is not None
    assert result.error["status"] == 499
    assert (await page("cancel", ENDPOINT, requestId=request_id)).error is None, "a repeat gets the same answer"


async def test_client_timeout_cancels_a_running_job(page: PageClient, store: JobStore, files: FileStore) -> None:
    async with working(store, files):
        done = await page("subscribe", ENDPOINT, input={"prompt": "endless"}, timeout=1000, pollInterval=100)
        assert done.error is not None
        assert "timed out" in done.error["message"]
        assert done.updates[-1]["status"] == "IN_PROGRESS"
        job_id = UUID(done.updates[-1]["request_id"])
        async with asyncio.timeout(5), store.watch(job_id) as watch:
            while (job := await store.get(job_id)) and not job.state.ended:
                await watch.changed(1)
    assert job is not None
    assert job.state is JobState.CANCELLED


async def test_invalid_input_fails_at_submit_with_the_field(page: PageClient, wire: Wire) -> None:
    done = await page("subscribe", ENDPOINT, input={"prompt": "x", "num_inference_steps": 0})
    assert done.error is not None
    assert (done.error["name"], done.error["status"]) == ("ValidationError", 422)
    [fault] = done.error["fieldErrors"]
    assert (fault["loc"], fault["type"], fault["ctx"]) == (["body", "num_inference_steps"], "greater_than_equal", {"ge": 1})
    assert UUID(done.error["requestId"])
    assert len(wire.requests) == 1


async def test_no_input_at_all_is_an_empty_object(page: PageClient) -> None:
    done = await page("submit", ENDPOINT)
    assert done.error is not None
    assert [(fault["loc"], fault["type"]) for fault in done.error["fieldErrors"]] == [(["body", "prompt"], "missing")]


async def test_invalid_input_with_a_webhook_becomes_a_job_that_failed(page: PageClient) -> None:
    submitted = await page("submit", ENDPOINT, input={}, webhookUrl="https://example.com/hook")
    request_id = submitted.value["request_id"]
    status = await page("status", ENDPOINT, requestId=request_id)
    assert (status.value["status"], status.value["error_type"]) == ("COMPLETED", "missing")
    result = await page("result", ENDPOINT, requestId=request_id)
    assert result.error is not None
    assert (result.error["name"], result.error["fieldErrors"][0]["loc"]) == ("ValidationError", ["body", "prompt"])


async def test_a_job_that_fails_runs_through_to_completed_and_then_raises(
    page: PageClient, store: JobStore, files: FileStore
) -> None:
    async with working(store, files):
        done = await page("subscribe", ENDPOINT, input={"prompt": "fails ImageLoadError"}, pollInterval=50)
    assert done.updates[-1]["status"] == "COMPLETED"
    assert done.updates[-1]["error_type"] == "image_load_error"
    assert done.error is not None
    assert (done.error["name"], done.error["status"]) == ("ValidationError", 422)
    assert done.error["fieldErrors"][0]["type"] == "image_load_error"
    assert done.error["requestId"] == done.updates[-1]["request_id"]


async def test_unknown_request_and_unknown_endpoint(page: PageClient, wire: Wire) -> None:
    unknown = await page("status", ENDPOINT, requestId=str(uuid4()))
    assert unknown.error is not None
    assert (unknown.error["status"], unknown.error["body"]) == (404, {"status": "NOT_FOUND"})
    elsewhere = await page("submit", "fal-ai/no-such-model", input=INPUT)
    assert elsewhere.error is not None
    assert (elsewhere.error["status"], elsewhere.error["body"]["error_type"]) == (404, "not_found")
    assert len(wire.requests) == 2


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


async def test_a_page_follows_a_request_with_a_token_in_place_of_the_key(
    settings: Settings, store: JobStore, files: FileStore
) -> None:
    secret = await store.keys.create("studio")
    wire = Wire(create_app(settings.model_copy(update={"auth": "keys"}), store))
    async with listening(wire) as url, working(store, files):
        page = PageClient(url, key=secret)
        submitted = await page("submit", ENDPOINT, input=INPUT)
        request_id = submitted.value["request_id"]
        followed = await page("streamStatus", ENDPOINT, requestId=request_id, logs=True, connectionMode="client")
    assert followed.error is None
    assert followed.value["status"] == "COMPLETED"
    assert wire.count("POST", "https://rest.fal.ai/tokens/") == 1
    assert wire.count("GET", f"/queue/{ENDPOINT}/requests/{request_id}/status/stream") == 1


async def test_a_missing_scope_is_told_and_not_retried(settings: Settings, store: JobStore) -> None:
    wire = Wire(create_app(settings.model_copy(update={"auth": "keys"}), store))
    async with listening(wire) as url:
        refused = await PageClient(url, key=await store.keys.create("r", scopes=["read"]))("submit", ENDPOINT, input=INPUT)
    assert refused.error is not None
    assert (refused.error["status"], refused.error["body"]["error_type"]) == (403, "forbidden")
    assert wire.count("POST", ENDPOINT) == 1


async def test_keys(settings: Settings, store: JobStore, page_client: Callable[[str], PageClient]) -> None:
    secret = await store.keys.create("studio")
    async with listening(create_app(settings.model_copy(update={"auth": "keys"}), store)) as url:
        refused = await page_client(url)("submit", ENDPOINT, input=INPUT)
        assert refused.error is not None
        assert refused.error["status"] == 401
        accepted = await PageClient(url, key=secret)("submit", ENDPOINT, input=INPUT)
        assert accepted.value["status"] == "IN_QUEUE"
