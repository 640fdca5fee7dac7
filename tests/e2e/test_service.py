"""The whole service on a real Ray, asked by real clients."""

import asyncio
import base64
import io
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import httpx
import pytest
from PIL import Image

from deployments.cli.client import CallFailed, QueueClient
from deployments.hosting.demo_weights import demo_inputs
from engines.animatediff.spec import AnimateDiffSpec
from engines.pipeline import Pipeline
from tests.deployments.webhooks.receiver import answering, is_signed, receiving
from tests.e2e.files import serving
from tests.e2e.service import REELRAY, Service
from tests.patience import PATIENCE_S
from tests.wire.page import PageClient

ENDPOINT = "fal-ai/animatediff-sparsectrl-lcm"
LONG = {"prompt": "a red ball", "num_inference_steps": 40, "guidance_scale": 2}
"""Some seconds of work."""


@pytest.fixture
def client(service: Service) -> Iterator[QueueClient]:
    with QueueClient(service.url) as client:
        yield client


@pytest.fixture
def media(tmp_path: Path) -> Iterator[str]:
    """The URL of a loopback file server."""
    Image.new("RGB", (30, 30), "red").save(tmp_path / "red.png")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "huge.png").write_bytes(b"")
    with (tmp_path / "huge.png").open("wb") as huge:
        huge.truncate(200_000_000)

    with serving(tmp_path) as url:
        yield url


def finished(client: QueueClient, request_id: str) -> dict:
    *_, last = client.follow(ENDPOINT, request_id)
    return last


def wait_for_step(client: QueueClient, request_id: str, unit: str = "step") -> None:
    for status in client.follow(ENDPOINT, request_id):
        if any(unit in line.get("progress", ()) for line in status["logs"] or ()):
            return


async def test_the_page_code_renders_a_playable_video(service: Service, page_client: Callable[[str], PageClient]):
    page = page_client(service.url)
    done = await page("subscribe", ENDPOINT, input=demo_inputs()[ENDPOINT])
    assert done.error is None
    assert done.value["data"]["seed"] == 42
    lines = done.updates[-1]["logs"]
    assert [line["message"].partition(",")[0] for line in lines] == [f"denoise: step {i}/4" for i in range(5)]
    assert [line["seq"] for line in lines] == [1, 2, 3, 4, 5]
    assert done.updates[-1]["metrics"]["inference_time"] > 0
    assert done.updates[-1]["metrics"]["receipt"]["engine"] == "eager"
    video = done.value["data"]["video"]
    mp4 = await asyncio.to_thread(lambda: httpx.get(video["url"], timeout=PATIENCE_S).content)
    assert (video["content_type"], video["file_name"], video["file_size"]) == ("video/mp4", "video.mp4", len(mp4))
    with av.open(io.BytesIO(mp4)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert [frame.shape for frame in frames] == [(64, 64, 3)] * 16


async def test_the_page_submits_follows_and_fetches(service: Service, page_client: Callable[[str], PageClient]):
    page = page_client(service.url)
    submitted = await page(
        "submit", ENDPOINT, input={"prompt": "a red ball"}, webhookUrl="https://optional.webhook.url/for/results"
    )
    request_id = submitted.value["request_id"]
    while (await page("status", ENDPOINT, requestId=request_id, logs=True)).value["status"] != "COMPLETED":
        pass
    result = await page("result", ENDPOINT, requestId=request_id)
    assert result.value["requestId"] == request_id
    assert result.value["data"]["video"]["url"].startswith(service.url)


async def test_webhooks_arrive_signed(service: Service):
    async with receiving(answering(200)) as receiver, httpx.AsyncClient(base_url=service.url, timeout=PATIENCE_S) as http:
        submission = {"json": {"prompt": "a red ball", "seed": 3}, "params": {"fal_webhook": receiver.url()}}
        request_id = (await http.post(f"/queue/{ENDPOINT}", **submission)).json()["request_id"]
        await receiver.arrival(1)
        result = await http.get(f"/queue/{ENDPOINT}/requests/{request_id}")
        keys = (await http.get("/.well-known/jwks.json")).json()
    [received] = receiver.received
    assert received.json["payload"] == result.json()
    assert received.json["payload"]["video"]["url"].startswith(service.url)
    assert is_signed(received, keys, time.time())


async def test_the_status_stream_passes_through_serve_as_it_happens(service: Service, page_client: Callable[[str], PageClient]):
    done = await page_client(service.url)("subscribe", ENDPOINT, input=LONG, mode="streaming")
    assert done.error is None
    assert len([update for update in done.updates if update["status"] == "IN_PROGRESS"]) > 3
    steps = [line["progress"]["step"]["done"] for line in done.updates[-1]["logs"] if "progress" in line]
    assert (steps[0], steps[-1]) == (0, 40)
    assert steps == sorted(set(steps))
    assert len(steps) > 10


def test_the_command_line_submits_watches_and_keeps_the_video(service: Service, tmp_path: Path):
    (tmp_path / "job.json").write_text('{"prompt": "a red ball", "seed": 9}')
    out = tmp_path / "video.mp4"
    words = [
        "submit",
        "animatediff-sparsectrl-lcm",
        "--input",
        tmp_path / "job.json",
        "--watch",
        "--out",
        out,
        "--url",
        service.url,
    ]
    done = subprocess.run([REELRAY, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert '"seed": 9' in done.stdout
    assert "denoise: step 4/4" in done.stderr
    with av.open(str(out)) as container:
        assert len(list(container.decode(video=0))) == 16


def test_the_service_renders_the_bytes_that_the_pipeline_renders(service: Service, client: QueueClient):
    request_id = client.submit(ENDPOINT, {"prompt": "a red ball", "seed": 7})
    finished(client, request_id)
    mp4 = client.download(client.result(ENDPOINT, request_id)["video"]["url"])
    pipeline = Pipeline("animatediff-sparsectrl-lcm", service.settings.model_configs()["animatediff-sparsectrl-lcm"])
    assert pipeline.render(AnimateDiffSpec(7, 4, 1.0, "a red ball")).mp4 == mp4


def test_jobs_side_by_side_do_not_disturb_each_other(client: QueueClient):
    job = {"guidance_scale": 2, "seed": 1, "num_inference_steps": 2}
    jobs = [job | {"prompt": "ball" * (n % 6 + 1), "negative_prompt": "x" * (n % 6)} for n in range(12)]
    ids = [client.submit(ENDPOINT, job) for job in jobs]
    assert all("error" not in finished(client, request_id) for request_id in ids)
    files = [client.download(client.result(ENDPOINT, request_id)["video"]["url"]) for request_id in ids]
    assert files[:6] == files[6:]
    assert len(set(files)) == 6


def test_a_seed_is_drawn_and_returned(client: QueueClient):
    seeds = set()
    for _ in range(2):
        request_id = client.submit(ENDPOINT, {"prompt": "a red ball", "num_inference_steps": 1})
        finished(client, request_id)
        seeds.add(client.result(ENDPOINT, request_id)["seed"])
    assert len(seeds) == 2


def test_a_cut_prompt_is_reported_in_the_log(client: QueueClient):
    request_id = client.submit(ENDPOINT, {"prompt": "ball" * 30, "num_inference_steps": 1})
    first, *_ = finished(client, request_id)["logs"]
    assert (first["level"], first["message"]) == ("WARN", "prompt cut to its first 75 of 120 tokens")


def test_keyframes_come_by_url_by_data_uri_and_by_upload(client: QueueClient, service: Service, media: str):
    buffer = io.BytesIO()
    Image.new("RGB", (30, 30), "red").save(buffer, "PNG")
    uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    hidden = {"x-fal-object-lifecycle": '{"initial_acl": {"default": "hide"}}', "content-type": "image/png"}
    stored = httpx.post(f"{service.url}/files/upload", content=buffer.getvalue(), headers=hidden, timeout=PATIENCE_S)
    uploaded = stored.json()["access_url"]
    assert httpx.get(uploaded, timeout=PATIENCE_S).status_code == 404
    files = []
    for source in (f"{media}/red.png", uri, uploaded):
        job = {"prompt": "a", "seed": 1, "keyframe_1_image_url": source, "keyframe_1_index": 3, "controlnet_type": "rgb"}
        request_id = client.submit(ENDPOINT, job)
        finished(client, request_id)
        files.append(client.download(client.result(ENDPOINT, request_id)["video"]["url"]))
    assert files[0] == files[1] == files[2]


BAD_KEYFRAMES = [  # the URL, the error's type
    ("{media}/missing.png", "file_download_error"),
    ("{media}/huge.png", "file_too_large"),
    ("{media}/text.png", "unsupported_image_format"),
    ("http://127.0.0.1:1/x.png", "file_download_error"),
    ("data:image/png;base64,iVBORw0KGgo=", "unsupported_image_format"),
    ("data:image/png,plain", "file_download_error"),
    ("http://xn--a/", "file_download_error"),
]


def test_a_bad_keyframe_ends_as_a_422_that_names_it_and_the_workers_live(client: QueueClient, service: Service, media: str):
    good = {"prompt": "a", "keyframe_0_image_url": f"{media}/red.png", "keyframe_0_index": 0, "keyframe_2_index": 9}
    ids = [client.submit(ENDPOINT, good | {"keyframe_2_image_url": url.format(media=media)}) for url, _ in BAD_KEYFRAMES]
    ids.append(client.submit(ENDPOINT, {"prompt": "the worker lives", "num_inference_steps": 1}))
    *bad, last = (finished(client, request_id) for request_id in ids)
    assert [status["error_type"] for status in bad] == [error_type for _, error_type in BAD_KEYFRAMES]
    assert "error" not in last
    for request_id, (_, error_type) in zip(ids, BAD_KEYFRAMES, strict=False):
        response = httpx.get(f"{service.url}/queue/{ENDPOINT}/requests/{request_id}", timeout=PATIENCE_S)
        assert response.status_code == 422
        (detail,) = response.json()["detail"]
        assert (detail["loc"], detail["type"]) == (["body", "keyframe_2_image_url"], error_type)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_inference_steps": "four"}, "num_inference_steps"),
        ({"num_inference_steps": 51}, "num_inference_steps"),
        ({"guidance_scale": 0.5}, "guidance_scale"),
        ({"seed": -2}, "seed"),
        ({"prompt": " "}, "prompt"),
        ({"keyframe_0_image_url": "https://a.example/x.png"}, "keyframe_0_index"),
        ({"keyframe_0_index": 4}, "keyframe_0_image_url"),
    ],
)
def test_bad_values_are_refused_at_once(client: QueueClient, change: dict, field: str):
    with pytest.raises(CallFailed, match=f"^body.{field}: "):
        client.submit(ENDPOINT, {"prompt": "a"} | change)


def test_a_running_job_is_cancelled_within_one_call_of_the_unet(client: QueueClient):
    request_id = client.submit(ENDPOINT, LONG)
    wait_for_step(client, request_id)
    assert client.cancel(ENDPOINT, request_id) == "CANCELLATION_REQUESTED"
    status = finished(client, request_id)
    assert status["error_type"] == "client_cancelled"
    steps = [line["message"] for line in status["logs"]]
    assert len(steps) < 40
    with pytest.raises(CallFailed, match="cancelled"):
        client.result(ENDPOINT, request_id)
    assert client.cancel(ENDPOINT, request_id) == "CANCELLATION_REQUESTED"
    after = client.submit(ENDPOINT, {"prompt": "the worker is free", "num_inference_steps": 1})
    assert "error" not in finished(client, after)


def test_a_job_that_is_cancelled_while_its_files_come_drops_them(client: QueueClient):
    with socket.create_server(("127.0.0.1", 0)) as slow:
        slow.settimeout(PATIENCE_S)
        url = f"http://127.0.0.1:{slow.getsockname()[1]}/x.png"
        request_id = client.submit(ENDPOINT, {"prompt": "a", "keyframe_0_image_url": url, "keyframe_0_index": 0})
        connection, _ = slow.accept()
        with connection:
            connection.settimeout(PATIENCE_S)
            assert connection.recv(10_000).startswith(b"GET /x.png")
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nsome")
            client.cancel(ENDPOINT, request_id)
            assert connection.recv(1) == b"", "hung up"
    assert finished(client, request_id)["error_type"] == "client_cancelled"


def test_unknown_things_are_404(client: QueueClient, service: Service):
    assert httpx.post(f"{service.url}/queue/fal-ai/unknown", json={}, timeout=PATIENCE_S).status_code == 404
    with pytest.raises(CallFailed, match="NOT_FOUND"):
        client.status(ENDPOINT, "00000000-0000-4000-8000-000000000000")
