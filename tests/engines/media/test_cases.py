"""Files that people reported as refused or shown wrongly. The tests beside vary their kinds."""

from pathlib import Path

import pytest
import torch

from engines.media.image import load_image, load_scribble
from engines.media.video_reader import open_video

CASES = Path(__file__).parent / "cases"


@pytest.mark.parametrize("name", ["exif-orientation6-resolution-as-text.jpg", "exif-orientation6-negative-over-zero.jpg"])
def test_a_photo_with_a_bad_tag_is_upright(name: str):
    red, _, blue = load_image((CASES / name).read_bytes(), 96, 64, 10**6)
    assert (red - blue)[:40].min() > 0.5
    assert (blue - red)[-40:].min() > 0.5


@pytest.mark.parametrize("name", ["scribble-black-on-transparent.png", "scribble-white-on-transparent.png"])
def test_strokes_are_white_on_black(name: str):
    pixels = load_scribble((CASES / name).read_bytes(), 256, 256, 10**6)
    assert pixels[:, 0].max() == 0
    assert 0.01 < (pixels == 1).float().mean() < 0.1


def test_hidden_magenta_is_not_shown():
    red, green, blue = load_image((CASES / "portrait-cut-out-over-magenta.png").read_bytes(), 256, 192, 10**6)
    assert not ((red > 0.9) & (green < 0.2) & (blue > 0.9)).any()


def test_a_gradient_of_32_bits_is_one():
    pixels = load_image((CASES / "gradient-32bit-0-to-252.tif").read_bytes(), 64, 64, 10**6)[0]
    assert torch.allclose(pixels[32], torch.linspace(0, 252 / 255, 64), atol=0.01)


@pytest.mark.parametrize(
    ("name", "frames", "size", "said"),
    [
        ("h264-one-packet-zeroed.mp4", 60, (64, 96), ["the video is damaged: 1 of 60 frames"]),
        ("avi-header-counts-300-of-60.avi", 60, (64, 96), []),
        ("anamorphic-sar-64-45.mp4", 12, (144, 256), []),
    ],
)
def test_a_video_gives_its_frames(name: str, frames: int, size: tuple[int, int], said: list[str]):
    with open_video(CASES / name, 10**6, 60) as video:
        assert [frame.shape[:2] for frame in video.frames(1, 1000)] == [size] * frames
        assert [note.partition(" could")[0] for note in video.notes] == said
