"""The demo models draw what they are told, through the whole service; and these tests would notice if they did not.

Each claim is also judged against something else than what was asked for, as if inputs had been shuffled, and must then fail.
"""

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from deployments.cli.client import QueueClient
from engines.controlnext.demo_pose import (
    DRIVER,
    FRAMES_PER_DANCE,
    REFERENCE,
    puppet_frame,
    puppet_image,
    puppet_joints,
    write_demo_pose,
    write_puppet_clip,
)
from engines.controlnext.pose.align import fit
from engines.controlnext.pose.dwpose import DWPose
from engines.controlnext.windows import windows
from engines.demo.animatediff.draw import images, scribbles
from engines.demo.animatediff.grammar import Scene, held_out
from engines.demo.animatediff.judge import judge, overlap, shape_mask, true_mask
from engines.demo.controlnext.judge import PuppetJudge
from engines.demo.shipped import shipped
from engines.media.video_reader import open_video
from tests.e2e.service import Service

Frames = NDArray[np.uint8]

ANIMATEDIFF, CONTROLNEXT = "fal-ai/animatediff-sparsectrl-lcm", "fal-ai/controlnext"
NEEDED = {"background": 0.95, "colour": 0.9, "motion": 0.85, "shape": 0.7}
FRAMES, SIDE, STRIDE, WINDOW, OVERLAP = 24, 256, 1, 8, 2

needs_animatediff = pytest.mark.skipif(not shipped("animatediff"), reason="the package has no trained AnimateDiff weights yet")
needs_controlnext = pytest.mark.skipif(not shipped("controlnext"), reason="the package has no trained ControlNeXt weights yet")


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[QueueClient]:
    """Of the service on the package's weights."""
    with QueueClient(service.url) as client:
        yield client


def render(client: QueueClient, endpoint: str, inputs: Sequence[dict[str, Any]]) -> list[Frames]:
    """Each job's frames, (F, H, W, 3)."""
    clips = []
    with TemporaryDirectory() as folder:
        for request_id in [client.submit(endpoint, job_input) for job_input in inputs]:
            *_, last = client.follow(endpoint, request_id)
            assert last["status"] == "COMPLETED", last
            path = Path(folder) / "video.mp4"
            path.write_bytes(client.download(client.result(endpoint, request_id)["video"]["url"]))
            with open_video(path, 10**6, 60) as video:
                clips.append(np.stack(list(video.frames(1, 1000))))
    return clips


def data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture(image: torch.Tensor) -> str:
    """(3, 64, 64) in [0, 1] as the 512x512 PNG that a caller would send."""
    levels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    png = io.BytesIO()
    Image.fromarray(levels).resize((512, 512), Image.Resampling.BICUBIC).save(png, "PNG")
    return data_uri(png.getvalue(), "image/png")


def shuffled(values: Sequence[Scene]) -> list[Scene]:
    """By a quarter: neighbours have the same shape."""
    start = len(values) // 4
    return [*values[start:], *values[:start]]


def shares(clips: Sequence[Frames], scenes: Sequence[Scene]) -> dict[str, float]:
    verdicts = [judge(clip).right(scene) for clip, scene in zip(clips, scenes, strict=True)]
    return {kind: float(np.mean([verdict[kind] for verdict in verdicts])) for kind in NEEDED}


# --- AnimateDiff ---

PLACED = [replace(s, across=(15, -15, 18, -18)[i % 4], along=(-4, 0, 4)[i % 3]) for i, s in enumerate(held_out()[::2])]
KEYS = [(0, 5, 10, 15)[i % 4] for i in range(len(PLACED))]


@pytest.fixture(scope="module")
def worded(client: QueueClient) -> list[Frames]:
    """A clip for each held-out caption."""
    inputs = [{"prompt": scene.caption, "seed": 1000 + i, "num_inference_steps": 4} for i, scene in enumerate(held_out())]
    return render(client, ANIMATEDIFF, inputs)


@needs_animatediff
def test_held_out_captions_are_followed(worded: list[Frames]):
    found = shares(worded, held_out())
    assert all(found[kind] >= least for kind, least in NEEDED.items()), found
    astray = shares(worded, shuffled(held_out()))
    assert all(astray[kind] < least for kind, least in NEEDED.items()), astray


def overlaps(clips: Sequence[Frames], scenes: Sequence[Scene]) -> float:
    """Mean IoU of what is drawn at the keyframes with the scenes' shapes there."""
    return float(
        np.mean(
            [
                overlap(shape_mask(clip[key]), true_mask(scene, scene.centre(key)))
                for clip, scene, key in zip(clips, scenes, KEYS, strict=True)
            ]
        )
    )


@needs_animatediff
def test_a_scribble_places_its_shape(client: QueueClient, worded: list[Frames]):
    drawn = [scribbles([scene], [scene.centre(key)], [2.0])[0] for scene, key in zip(PLACED, KEYS, strict=True)]
    inputs = [
        {"prompt": scene.caption, "seed": i, "keyframe_0_image_url": picture(image), "keyframe_0_index": key}
        for i, (scene, image, key) in enumerate(zip(PLACED, drawn, KEYS, strict=True))
    ]
    clips = render(client, ANIMATEDIFF, inputs)
    assert overlaps(clips, PLACED) >= 0.5
    assert overlaps(worded[::2], PLACED) <= 0.2  # the same captions without the keyframe
    assert overlaps(clips, shuffled(PLACED)) < 0.5


@needs_animatediff
def test_an_rgb_keyframe_gives_the_colours(client: QueueClient):
    inputs = [
        {
            "prompt": f"a {scene.shape} moves {scene.motion}",
            "seed": i,
            "controlnet_type": "rgb",
            "keyframe_0_image_url": picture(images([scene], [scene.centre(key)])[0]),
            "keyframe_0_index": key,
        }
        for i, (scene, key) in enumerate(zip(PLACED, KEYS, strict=True))
    ]
    clips = render(client, ANIMATEDIFF, inputs)
    found, astray = shares(clips, PLACED), shares(clips, shuffled(PLACED))
    assert found["colour"] >= NEEDED["colour"], found
    assert found["background"] >= NEEDED["background"], found
    assert astray["colour"] < NEEDED["colour"]
    assert astray["background"] < NEEDED["background"]


@needs_animatediff
def test_the_log_says_which_words_the_model_knows(client: QueueClient):
    request_id = client.submit(ANIMATEDIFF, {"prompt": "a red dragon moves left", "seed": 1})
    *_, last = client.follow(ANIMATEDIFF, request_id)
    (note,) = [line["message"] for line in last["logs"] if "does not know" in line["message"]]
    assert "dragon" in note
    assert "triangle" in note
    assert "red," not in note.partition(";")[0]


# --- ControlNeXt ---


@pytest.fixture(scope="module")
def danced(client: QueueClient) -> Frames:
    """`REFERENCE` moved by `DRIVER`'s dance: the reference's own frame, then the driving ones."""
    with TemporaryDirectory() as folder:
        clip = Path(folder) / "driver.mp4"
        write_puppet_clip(clip, FRAMES, SIDE, SIDE, 14)
        video = data_uri(clip.read_bytes(), "video/mp4")
    job_input = {
        "image_url": data_uri(puppet_image(SIDE, SIDE), "image/png"),
        "video_url": video,
        "height": SIDE,
        "width": SIDE,
        "guidance_scale": 1,
        "num_inference_steps": 4,
        "sample_stride": STRIDE,
        "batch_frames": WINDOW,
        "overlap": OVERLAP,
        "seed": 5,
    }
    (frames,) = render(client, CONTROLNEXT, [job_input])
    assert len(frames) == FRAMES + 1
    return frames


def driving_joints(times: Sequence[float], folder: Path) -> NDArray[np.float64]:
    """(F, 17, 2): where the joints of the driver's dance lie on the reference's body, as the service aligns them."""
    write_demo_pose(folder)
    dwpose = DWPose(folder, threads=1)
    driver = [dwpose(puppet_frame(DRIVER, time, SIDE, SIDE)) for time in times]
    alignment = fit(dwpose(puppet_frame(REFERENCE, 0, SIDE, SIDE)), driver, (SIDE, SIDE), (SIDE, SIDE))
    scale = np.array((alignment.scale_x, alignment.scale_y))
    shift = SIDE * np.array((alignment.shift_x, alignment.shift_y))
    return np.stack([puppet_joints(DRIVER, time, SIDE, SIDE) * scale + shift for time in times])


@needs_controlnext
def test_the_puppet_follows_the_driver_in_the_references_colours(danced: Frames, tmp_path: Path):
    times = [i / FRAMES_PER_DANCE for i in range(FRAMES)]
    wanted, judged = driving_joints(times, tmp_path), PuppetJudge()
    right = judged(danced[1:], wanted, REFERENCE)
    assert right.error <= 0.05, right
    assert right.found >= 0.7, right
    assert right.colours >= 0.8, right
    assert judged(danced[1:], wanted, DRIVER).colours < 0.5
    half = FRAMES // 2
    wrong = judged(danced[1:], np.roll(wanted, half, axis=0), REFERENCE)  # another dance
    assert wrong.error > 0.05, wrong


@needs_controlnext
def test_windows_join_without_a_jump(danced: Frames):
    jumps = [float(np.abs(a.astype(float) - b).mean()) for a, b in pairwise(danced[1:])]  # i: from frame i + 1 to i + 2
    edges = {edge for w in windows(len(danced), WINDOW, OVERLAP) for edge in (w.start + w.first_counted, w.stop)}
    seams = [jumps[edge - 2] for edge in edges if 2 <= edge < len(danced)]
    assert len(seams) >= 4
    assert max(seams) <= 1.5 * np.median(jumps), (seams, jumps)
