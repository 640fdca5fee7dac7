"""Every file of the collected cases (`tests/engines/media/cases`) through the running service, to the endpoint it belongs to.

A picture must give the video that a plain PNG of what it shows gives, byte for byte. Then some of the hostile files, of which
`tests/deployments/stages/test_hostile.py` has the others: each is refused, and the service renders on.
"""

import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import pytest
from PIL import Image

from deployments.cli.client import QueueClient
from engines.controlnext.demo_pose import puppet_image
from engines.media.picture import BACKGROUND
from tests.deployments.stages.hostile import OTHERS, chunk, png, videos
from tests.e2e.files import serving
from tests.e2e.service import Service
from tests.engines.media.test_cases import CASES
from tests.patience import PATIENCE_S

PICTURES = "fal-ai/animatediff-sparsectrl-lcm"
VIDEOS = "fal-ai/controlnext"
BRIGHT = "keyframe_0_image_url is mostly bright, so nearly all of it is taken for strokes: a scribble is white lines on black"


def upright(picture: Image.Image) -> Image.Image:
    return picture.transpose(Image.Transpose.ROTATE_270)


def on_grey(picture: Image.Image) -> Image.Image:
    ground = Image.new("RGB", picture.size, BACKGROUND)
    return Image.composite(picture.convert("RGB"), ground, picture.getchannel("A"))


def in_8_bits(picture: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(picture).astype(np.uint8))


def strokes(picture: Image.Image) -> Image.Image:
    return picture.getchannel("A")


SHOWN: dict[str, tuple[str, Callable[[Image.Image], Image.Image], list[str]]] = {
    # file: how it is read, what it shows, what the log warns of
    "exif-orientation6-resolution-as-text.jpg": ("rgb", upright, []),
    "exif-orientation6-negative-over-zero.jpg": ("rgb", upright, []),
    "portrait-cut-out-over-magenta.png": ("rgb", on_grey, []),
    "gradient-32bit-0-to-252.tif": ("rgb", in_8_bits, []),
    "scribble-black-on-transparent.png": ("scribble", strokes, []),
    "scribble-white-on-transparent.png": ("scribble", strokes, []),
    "sketch-dark-on-white.png": ("scribble", Image.Image.copy, [BRIGHT]),
}
DAMAGED = "the video is damaged: 1 of 60 frames could not be decoded"
DRIVEN = {  # file: its frames, what the log warns of
    "h264-one-packet-zeroed.mp4": (60, [DAMAGED]),
    "avi-header-counts-300-of-60.avi": (60, []),
    "anamorphic-sar-64-45.mp4": (12, []),
}
STRIDE = 8
SMALL = {"height": 256, "width": 256, "num_inference_steps": 1, "guidance_scale": 1, "sample_stride": STRIDE, "seed": 1}
HOSTILE_PICTURES = {
    "ten-gigapixels": lambda: png(100_000, 100_000, chunk(b"IDAT", b"")),
    "a-bomb-beside-the-pixels": lambda: png(64, 64, chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(60_000_000)))),
    "an-svg": lambda: OTHERS["an SVG that includes a file"],
    "a-pickle": lambda: OTHERS["a pickle"],
}
HOSTILE_VIDEOS = ("a frame of gigapixels, h264", "samples in another file", "an index of 64 million samples", "boxes in boxes")


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server of the cases, a plain PNG beside each picture, and a person."""
    folder = tmp_path_factory.mktemp("cases")
    for case in CASES.iterdir():
        (folder / case.name).symlink_to(case)
    for name, (_, shown, _) in SHOWN.items():
        with Image.open(CASES / name) as picture:
            shown(picture).convert("RGB").save(folder / f"{name}.png")
    (folder / "person.png").write_bytes(puppet_image(256, 256))
    with serving(folder) as url:
        yield url


def outcome(client: QueueClient, endpoint: str, request_id: str) -> tuple[bytes, list[str]]:
    """The video, and the warnings of the log."""
    *_, last = client.follow(endpoint, request_id)
    assert "error" not in last, last
    video = client.download(client.result(endpoint, request_id)["video"]["url"])
    return video, [line["message"] for line in last["logs"] if line["level"] == "WARN"]


def test_every_case_is_rendered_as_what_it_shows_and_said_what_is_wrong(service: Service, media: str):
    assert {case.name for case in CASES.iterdir()} == SHOWN.keys() | DRIVEN.keys()
    asked: dict[str, Any] = {"prompt": "a", "seed": 1, "num_inference_steps": 1, "keyframe_0_index": 0}
    pose = SMALL | {"image_url": f"{media}/person.png", "video_is_pose": True}
    with QueueClient(service.url) as client:
        pictures = {
            name: [
                client.submit(PICTURES, asked | {"controlnet_type": kind, "keyframe_0_image_url": f"{media}/{file}"})
                for file in (name, f"{name}.png")
            ]
            for name, (kind, *_) in SHOWN.items()
        }
        videos = {name: client.submit(VIDEOS, pose | {"video_url": f"{media}/{name}"}) for name in DRIVEN}
        nobody = client.submit(VIDEOS, pose | {"video_url": f"{media}/anamorphic-sar-64-45.mp4", "video_is_pose": False})
        good = client.submit(PICTURES, {"prompt": "the workers live", "num_inference_steps": 1})
        made = {name: [outcome(client, PICTURES, request_id) for request_id in pair] for name, pair in pictures.items()}
        for name, (*_, warnings) in SHOWN.items():
            (video, told), (plain, _) = made[name]
            assert told == warnings, name
            assert video == plain, name
        assert len({pair[0][0] for pair in made.values()}) >= len(made) - 2, "what they show is seen"
        for name, (frames, warnings) in DRIVEN.items():
            video, told = outcome(client, VIDEOS, videos[name])
            assert [line.partition(", and")[0] for line in told] == warnings, name
            with av.open(io.BytesIO(video)) as container:
                assert len(list(container.decode(video=0))) == 1 + -(-frames // STRIDE), name
        *_, last = client.follow(VIDEOS, nobody)
        assert last["error_type"] == "pose_detection_error", "the demo's nets know no such figure"
        outcome(client, PICTURES, good)


def test_hostile_files_are_refused_and_the_service_renders_on(service: Service, tmp_path: Path):
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    made = {name: make() for name, make in HOSTILE_PICTURES.items()}
    made |= {name.replace(" ", "-"): data for name, data in videos(tmp_path) if name in HOSTILE_VIDEOS}
    assert len(made) == len(HOSTILE_PICTURES) + len(HOSTILE_VIDEOS)
    for name, data in made.items():
        (hostile / name).write_bytes(data)
    (hostile / "person").write_bytes(puppet_image(256, 256))
    with serving(hostile) as url, QueueClient(service.url) as client:
        jobs = {}
        for name in made:
            if name in HOSTILE_PICTURES:
                endpoint, field = PICTURES, "keyframe_0_image_url"
                asked: dict[str, Any] = {"prompt": "a", "num_inference_steps": 1, "keyframe_0_index": 0}
            else:
                endpoint, field = VIDEOS, "video_url"
                asked = SMALL | {"image_url": f"{url}/person", "video_is_pose": True}
            jobs[name] = (endpoint, field, client.submit(endpoint, asked | {field: f"{url}/{name}"}))
        for name, (endpoint, field, request_id) in jobs.items():
            for _ in client.follow(endpoint, request_id):
                pass
            answer = httpx.get(f"{service.url}/queue/{endpoint}/requests/{request_id}", timeout=PATIENCE_S)
            assert answer.status_code == 422, (name, answer.text)
            assert answer.json()["detail"][0]["loc"] == ["body", field], (name, answer.text)
        good = client.submit(PICTURES, {"prompt": "a", "num_inference_steps": 1, "seed": 1})
        outcome(client, PICTURES, good)
