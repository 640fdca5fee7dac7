"""The second endpoint through the whole service: a person of one picture moving like the one in a video."""

import asyncio
import base64
import io
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import pytest
from PIL import Image

from deployments.cli.client import CallFailed, QueueClient
from deployments.schemas.endpoint import ENDPOINTS
from engines.controlnext.demo_pose import puppet_image, write_puppet_clip
from engines.media.video import encode_h264
from engines.pipeline import Pipeline
from tests.e2e.files import serving
from tests.e2e.service import Service
from tests.engines.controlnext.media import huge_png
from tests.patience import PATIENCE_S
from tests.wire.page import PageClient

ENDPOINT = "fal-ai/controlnext"
SMALL: dict[str, Any] = {
    "height": 256,
    "width": 256,
    "num_inference_steps": 2,
    "sample_stride": 1,
    "batch_frames": 4,
    "overlap": 1,
    "seed": 3,
}
CLIP_FRAMES = 9
DRIVEN_FRAMES = 6
"""How many of them are used: with the picture, two windows."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    clip = folder / "clip.mp4"
    (folder / "image.png").write_bytes(puppet_image(256, 256))
    write_puppet_clip(clip, CLIP_FRAMES, 256, 256, 14)
    Image.new("RGB", (256, 256), "grey").save(folder / "nobody.png")
    (folder / "nobody.mp4").write_bytes(encode_h264(iter([np.full((4, 64, 64, 3), 120, np.uint8)]), 64, 64, 10)[0])
    (folder / "text.mp4").write_text("not a video at all, whatever its name says")
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "truncated.mp4").write_bytes(clip.read_bytes()[:2500])
    with wave.open(str(folder / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    # 100,000 x 100,000 in the sample entry, where the decoder looks
    huge = bytearray(clip.read_bytes())
    entry = huge.index(b"avc1", huge.index(b"stsd"))
    huge[entry + 28 : entry + 32] = (0xFFFF).to_bytes(2, "big") * 2  # the field ends at 65,535
    (folder / "huge.mp4").write_bytes(huge)
    (folder / "huge.png").write_bytes(huge_png())
    return folder


@pytest.fixture(scope="module")
def media(folder: Path) -> Iterator[str]:
    with serving(folder) as url:
        yield url


@pytest.fixture
def client(service: Service) -> Iterator[QueueClient]:
    with QueueClient(service.url) as client:
        yield client


def data_uri(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def finished(client: QueueClient, request_id: str) -> dict[str, Any]:
    *_, last = client.follow(ENDPOINT, request_id)
    return last


@pytest.mark.parametrize("given", ["by URL", "as data URIs"])
async def test_the_page_code_renders_a_driven_clip(
    service: Service, page_client: Callable[[str], PageClient], folder: Path, media: str, given: str
):
    image = f"{media}/image.png" if given == "by URL" else data_uri(folder / "image.png", "image/png")
    video = f"{media}/clip.mp4" if given == "by URL" else data_uri(folder / "clip.mp4", "video/mp4")
    page = page_client(service.url)
    asked = SMALL | {"image_url": image, "video_url": video, "fps": 12, "max_frame_num": 1 + DRIVEN_FRAMES}
    done = await page("subscribe", ENDPOINT, input=asked)
    assert done.error is None
    assert done.value["data"]["seed"] == 3
    file = done.value["data"]["video"]
    mp4 = await asyncio.to_thread(lambda: httpx.get(file["url"], timeout=PATIENCE_S).content)
    assert (file["content_type"], file["file_size"]) == ("video/mp4", len(mp4))
    with av.open(io.BytesIO(mp4)) as container:
        stream = container.streams.video[0]
        assert (stream.average_rate, stream.width, stream.height) == (12, 256, 256)
        assert len(list(container.decode(video=0))) == 1 + DRIVEN_FRAMES
    receipt = done.updates[-1]["metrics"]["receipt"]
    assert (receipt["units"], receipt["replicas"] in (1, 2)) == (2 * 2 * 2, True), "windows, halves of the guidance, steps"
    assert all(part.keys() == {"fingerprint"} for part in receipt["weights"].values())
    lines = done.updates[-1]["logs"]
    assert [line["seq"] for line in lines] == list(range(1, len(lines) + 1))
    told = [line["progress"] for line in lines]
    assert [progress["step"]["done"] for progress in told if "step" in progress and "window" not in progress] == [0, 1, 2]
    assert {"done": DRIVEN_FRAMES, "total": DRIVEN_FRAMES} in [progress.get("pose") for progress in told]
    assert {"done": 1 + DRIVEN_FRAMES, "total": 1 + DRIVEN_FRAMES} in [progress.get("frame") for progress in told]
    stages = [progress["stage"] for progress in told]
    assert stages == sorted(stages, key=["preprocess", "denoise", "decode"].index)


def test_the_service_renders_the_bytes_that_the_pipeline_renders(service: Service, client: QueueClient, folder: Path, media: str):
    asked = SMALL | {"image_url": f"{media}/image.png", "video_url": f"{media}/clip.mp4", "max_frame_num": 5}
    request_id = client.submit(ENDPOINT, asked)
    finished(client, request_id)
    mp4 = client.download(client.result(ENDPOINT, request_id)["video"]["url"])
    pipeline = Pipeline("controlnext", service.settings.model_configs()["controlnext"])
    files = {"image_url": folder / "image.png", "video_url": folder / "clip.mp4"}
    spec = ENDPOINTS[ENDPOINT].input.model_validate(asked).spec(files)
    assert pipeline.render(spec).mp4 == mp4


BAD_MEDIA = [  # image, video, the field that is named, the error's type
    ("image.png", "nobody.mp4", "video_url", "pose_detection_error"),
    ("image.png", "text.mp4", "video_url", "unsupported_video_format"),
    ("image.png", "empty.mp4", "video_url", "unsupported_video_format"),
    ("image.png", "sound.mp4", "video_url", "unsupported_video_format"),
    ("image.png", "sound.wav", "video_url", "unsupported_video_format"),
    ("image.png", "image.png", "video_url", "unsupported_video_format"),
    ("image.png", "truncated.mp4", "video_url", "video_load_error"),
    ("image.png", "huge.mp4", "video_url", "image_too_large"),
    ("image.png", "missing.mp4", "video_url", "file_download_error"),
    ("nobody.png", "clip.mp4", "image_url", "pose_detection_error"),
    ("huge.png", "clip.mp4", "image_url", "image_too_large"),
    ("clip.mp4", "clip.mp4", "image_url", "unsupported_image_format"),
]


def test_bad_media_end_as_a_422_that_names_them_and_the_workers_live(client: QueueClient, service: Service, media: str):
    asked = [SMALL | {"image_url": f"{media}/{image}", "video_url": f"{media}/{video}"} for image, video, *_ in BAD_MEDIA]
    ids = [client.submit(ENDPOINT, job) for job in asked]
    good = {"image_url": f"{media}/image.png", "video_url": f"{media}/clip.mp4", "max_frame_num": 2, "num_inference_steps": 1}
    ids.append(client.submit(ENDPOINT, SMALL | good))
    *bad, last = (finished(client, request_id) for request_id in ids)
    assert [status["error_type"] for status in bad] == [error_type for *_, error_type in BAD_MEDIA]
    assert "error" not in last
    for request_id, (*_, field, error_type) in zip(ids, BAD_MEDIA, strict=False):
        response = httpx.get(f"{service.url}/queue/{ENDPOINT}/requests/{request_id}", timeout=PATIENCE_S)
        assert response.status_code == 422
        (detail,) = response.json()["detail"]
        assert (detail["loc"], detail["type"]) == (["body", field], error_type)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"overlap": 0}, "overlap"),
        ({"overlap": 6}, "overlap"),
        ({"overlap": 7}, "overlap"),
        ({"height": 1000}, "height"),
        ({"width": 584}, "width"),
        ({"sample_stride": 0}, "sample_stride"),
        ({"max_frame_num": 1}, "max_frame_num"),
        ({"video_url": "file:///etc/passwd"}, "video_url"),
    ],
)
def test_bad_values_are_refused_at_once(client: QueueClient, change: dict[str, Any], field: str):
    urls = {"image_url": "https://a.example/x.png", "video_url": "https://a.example/x.mp4"}
    with pytest.raises(CallFailed, match=f"^body.{field}: "):
        client.submit(ENDPOINT, SMALL | urls | change)


def test_a_running_job_is_cancelled_within_one_call_of_a_net(client: QueueClient, media: str):
    urls = {"image_url": f"{media}/image.png", "video_url": f"{media}/clip.mp4"}
    request_id = client.submit(ENDPOINT, SMALL | urls | {"num_inference_steps": 50})
    for status in client.follow(ENDPOINT, request_id):
        if any("step" in line["progress"] for line in status["logs"] or ()):
            break
    client.cancel(ENDPOINT, request_id)
    status = finished(client, request_id)
    assert status["error_type"] == "client_cancelled"
    assert status["logs"][-1]["progress"]["step"]["done"] < 50


def test_one_video_is_made_by_two_replicas_and_neither_the_loss_of_one_nor_of_the_sampler_changes_a_bit(
    service: Service, client: QueueClient, folder: Path
):
    given = {"image_url": data_uri(folder / "image.png", "image/png"), "video_url": data_uri(folder / "clip.mp4", "video/mp4")}
    asked = SMALL | given | {"num_inference_steps": 16}
    undisturbed = client.submit(ENDPOINT, asked)
    finished(client, undisturbed)
    request_id = client.submit(ENDPOINT, asked)
    killed = set()
    for status in client.follow(ENDPOINT, request_id):
        steps = [line["progress"]["step"]["done"] for line in status["logs"] or () if "step" in line.get("progress", {})]
        for at, word in ((3, "controlnext-denoise"), (8, ":sampler")):
            if max(steps, default=0) >= at and word not in killed:
                killed.add(word)
                service.processes(word)[0].kill()
    assert killed == {"controlnext-denoise", ":sampler"}
    lines = [line["message"] for line in status["logs"]]
    (resumed,) = [int(line.split()[-1].partition("/")[0]) for line in lines if line.startswith("resumed at step")]
    assert resumed >= 3, "the replica's loss cost no attempt, and the sampler's no step before its checkpoint"
    videos = [client.download(client.result(ENDPOINT, each)["video"]["url"]) for each in (undisturbed, request_id)]
    assert videos[0] == videos[1]
