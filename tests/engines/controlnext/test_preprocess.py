from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_video_diffusion import pipeline_stable_video_diffusion as svd
from PIL import Image

from engines.checkpoints.source import DType
from engines.controlnext.checkpoint import load_vae
from engines.controlnext.config import ControlNeXtConfig, ControlNeXtWeights
from engines.controlnext.demo_pose import DRIVER, puppet_frame, puppet_image, write_puppet_clip
from engines.controlnext.nets.clip_image import clip_pixels
from engines.controlnext.pose import detector
from engines.controlnext.pose.align import Alignment, fit
from engines.controlnext.pose.skeleton import Pose
from engines.controlnext.preprocess import REFERENCE_IDS, Preprocess
from engines.controlnext.spec import ControlNeXtConditioning, ControlNeXtSpec
from engines.errors import (
    Cancelled,
    ImageLoadError,
    ImageTooLarge,
    ImageTooSmall,
    ModelError,
    PersonNotFound,
    UnsupportedImageFormat,
    UnsupportedVideoFormat,
    ValueTooLarge,
    VideoLoadError,
    VideoTooLong,
)
from engines.media.video import encode_h264
from engines.sampling import seeded_generator
from engines.spec import Progress
from tests.engines.controlnext import reference
from tests.engines.controlnext.media import huge_png

HEIGHT, WIDTH = 192, 128
CLIP_FRAMES, DRIVING = 9, 5
"""Frames of the clip, and those of them that drive: 0, 2, ..., 8."""


@pytest.fixture(scope="module")
def preprocess(controlnext_weights: ControlNeXtWeights) -> Preprocess:
    return Preprocess(ControlNeXtConfig(weights=controlnext_weights, threads=1))


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    (folder / "image.png").write_bytes(puppet_image(HEIGHT, WIDTH))
    write_puppet_clip(folder / "clip.mp4", CLIP_FRAMES, 256, 320, 14)  # another aspect ratio than the output
    return folder


@pytest.fixture
def spec(media: Path) -> ControlNeXtSpec:
    return ControlNeXtSpec(5, 3, 3.0, media / "image.png", media / "clip.mp4", height=HEIGHT, width=WIDTH, sample_stride=2)


def grey_clip(path: Path, frames: int = 3) -> Path:
    path.write_bytes(encode_h264(iter([np.full((frames, 64, 64, 3), 120, np.uint8)]), 64, 64, 10)[0])
    return path


def test_every_strided_frame_drives_one_frame_after_the_references_own(preprocess: Preprocess, spec: ControlNeXtSpec):
    given = preprocess.encode(spec)
    assert given.poses.shape == (1 + DRIVING, 3, HEIGHT, WIDTH)
    assert given.poses.dtype == torch.uint8
    assert all(pose.any() for pose in given.poses), "a skeleton in every frame"
    assert len({pose.numpy().tobytes() for pose in given.poses}) == 1 + DRIVING, "all of them different"


@pytest.mark.parametrize("max_frame_num", [2, 1 + DRIVING, 240])
def test_the_number_of_frames_is_capped_with_the_references_own_in_it(
    preprocess: Preprocess, spec: ControlNeXtSpec, max_frame_num: int
):
    assert len(preprocess.encode(replace(spec, max_frame_num=max_frame_num)).poses) == min(max_frame_num, 1 + DRIVING)


def test_the_driving_skeletons_are_moved_onto_the_references_body(preprocess: Preprocess, spec: ControlNeXtSpec):
    def extent(pose: torch.Tensor, dim: int) -> tuple[int, int]:
        used = pose.amax(dim=(0, dim)).nonzero()
        return int(used.min()), int(used.max())

    own, *driven = preprocess.encode(spec).poses
    (own_top, own_bottom), (own_left, own_right) = extent(own, 2), extent(own, 1)
    for pose in driven:  # the clip's figure is an eighth larger; its frame is wide, the output tall
        (top, bottom), (left, right) = extent(pose, 2), extent(pose, 1)
        assert abs(top - own_top) < 0.08 * HEIGHT
        assert abs(bottom - own_bottom) < 0.08 * HEIGHT
        assert abs((left + right) - (own_left + own_right)) / 2 < 0.1 * WIDTH
    # the figure keeps its proportions in pixels, whatever the aspect ratio: with arms out it is about as wide as the reference
    widest = max(extent(pose, 1)[1] - extent(pose, 1)[0] for pose in driven)
    assert 0.8 < widest / (own_right - own_left) < 1.25


def test_the_image_is_seen_as_the_reference_sees_it(preprocess: Preprocess, spec: ControlNeXtSpec):
    given = preprocess.encode(spec)
    image = preprocess.levels(spec).float() / 255  # rounded once, as published
    generator = seeded_generator(spec.seed)
    noise = torch.randn((1, 3, HEIGHT, WIDTH), generator=generator)
    vae, encoder = load_vae(preprocess.config, torch.float32), preprocess.image_encoder
    assert (given.image_latent - reference.image_latent(vae, 2 * image - 1, noise[0])).abs().max() <= 1e-5
    assert (clip_pixels(image, 224) - reference.clip_pixels(2 * image - 1)).abs().max() <= 1e-5
    expected = encoder(reference.clip_pixels(2 * image - 1)).image_embeds
    assert (given.image_embedding - expected).abs().max() <= 1e-5
    assert torch.equal(given.rng_state, generator.get_state()), "the image's noise is the request's first draw"


@pytest.mark.parametrize("size", [(1024, 576), (224, 224), (100, 300)])
def test_clips_pixels_are_diffusers_own(size: tuple[int, int]):
    image = torch.rand((3, *size), generator=torch.Generator().manual_seed(0))
    resized = (svd._resize_with_antialiasing((2 * image - 1)[None], (224, 224)) + 1) / 2
    mean, std = (torch.tensor(t)[:, None, None] for t in (reference.CLIP_MEAN, reference.CLIP_STD))
    assert (clip_pixels(image, 224) - (resized - mean) / std).abs().max() <= 1e-5


def test_the_ids_are_what_was_asked_for_or_the_published_codes(preprocess: Preprocess, spec: ControlNeXtSpec):
    asked = replace(spec, fps=12, motion_bucket_id=30.5, max_frame_num=2)
    assert preprocess.encode(asked).added_ids == (11.0, 30.5, 0.02)
    assert preprocess.encode(replace(asked, strict_reference=True)).added_ids == REFERENCE_IDS == (6.0, 128.0, 0.02)
    assert preprocess.encode(replace(spec, max_frame_num=2)).added_ids == (6.0, 127.0, 0.02), "the values of training"


def test_the_published_alignment_is_fitted_to_all_of_the_video(
    preprocess: Preprocess, spec: ControlNeXtSpec, monkeypatch: pytest.MonkeyPatch
):
    fitted: list[int] = []

    def counting(reference: Pose, driving: Sequence[Pose], *sizes: tuple[int, int]) -> Alignment:
        fitted.append(len(driving))
        return fit(reference, driving, *sizes)

    monkeypatch.setattr("engines.controlnext.preprocess.fit", counting)
    strict = replace(spec, strict_reference=True)
    few, all_ = preprocess.encode(replace(strict, max_frame_num=4)), preprocess.encode(strict)
    preprocess.encode(replace(spec, max_frame_num=4))
    assert fitted == [DRIVING, DRIVING, 3]
    assert torch.equal(few.poses, all_.poses[:4])


def test_of_several_people_the_one_of_the_references_size_drives(
    preprocess: Preprocess, spec: ControlNeXtSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    small = replace(DRIVER, size=DRIVER.size / 2)
    dance = [puppet_frame(DRIVER, i / 6, 256, 256) for i in range(6)]
    pair = [np.concatenate([frame, puppet_frame(small, i / 6, 256, 256)], axis=1) for i, frame in enumerate(dance)]
    for name, frames in (("alone.mp4", dance), ("pair.mp4", pair)):
        height, width = frames[0].shape[:2]
        (tmp_path / name).write_bytes(encode_h264(iter([np.stack(frames)]), height, width, 10)[0])
    alone = preprocess.encode(replace(spec, video=tmp_path / "alone.mp4", sample_stride=1))

    def two(cells: object, scale: float) -> np.ndarray:
        return np.array([(256.0, 0, 512, 256), (0, 0, 256, 256)]) if scale == 1.25 else found(cells, scale)

    found = detector.find_people
    monkeypatch.setattr(detector, "find_people", two)
    given = preprocess.encode(replace(spec, video=tmp_path / "pair.mp4", sample_stride=1))
    assert given.notes == ("6 of 6 frames show several people: the one closest to the reference's size drives the video",)
    assert alone.notes == ()
    apart = (given.poses.float() - alone.poses.float()).abs().mean()
    assert apart < 1, "as if nobody else were there, but for the codec's noise"
    with pytest.raises(PersonNotFound, match="exactly one person"):
        preprocess.encode(replace(spec, video=tmp_path / "pair.mp4", strict_reference=True))


def test_what_the_video_lacks_is_noted(preprocess: Preprocess, spec: ControlNeXtSpec, tmp_path: Path):
    data = bytearray(spec.video.read_bytes())
    with av.open(str(spec.video)) as container:
        packet = bytes([packet for packet in container.demux(video=0) if packet.size][7])
    data[data.index(packet) : data.index(packet) + len(packet)] = bytes(len(packet))
    (tmp_path / "video.mp4").write_bytes(data)
    (note,) = preprocess.encode(replace(spec, video=tmp_path / "video.mp4")).notes
    assert note.startswith("the video is damaged: 1 of 9 frames could not be decoded")


def test_the_same_seed_gives_the_same_tensors(preprocess: Preprocess, spec: ControlNeXtSpec):
    torch.manual_seed(1)
    one, other = preprocess.encode(spec), preprocess.encode(spec)
    for name in ("poses", "image_embedding", "image_latent", "rng_state"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert not torch.equal(one.image_latent, preprocess.encode(replace(spec, seed=6)).image_latent)


def test_a_video_of_drawn_poses_is_taken_as_it_is(preprocess: Preprocess, spec: ControlNeXtSpec, tmp_path: Path):
    shades = np.zeros((5, 64, 96, 3), np.uint8)
    shades[..., 0] = np.arange(40, 240, 40)[:, None, None]  # red
    (tmp_path / "poses.mp4").write_bytes(encode_h264(iter([shades]), 64, 96, 10)[0])
    given = preprocess.encode(replace(spec, video=tmp_path / "poses.mp4", video_is_pose=True, sample_stride=1))
    assert given.poses.shape == (6, 3, HEIGHT, WIDTH)
    levels = given.poses[1:].float().mean(dim=(2, 3))  # (5, 3)
    expected = torch.stack([torch.arange(40.0, 240, 40), torch.zeros(5), torch.zeros(5)], dim=1)
    assert (levels - expected).abs().max() < 6


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_in_half_precision_the_image_is_still_encoded_in_fp32(preprocess: Preprocess, spec: ControlNeXtSpec, dtype: DType):
    half = Preprocess(replace(preprocess.config, dtype=dtype)).encode(replace(spec, max_frame_num=2))
    full = preprocess.encode(replace(spec, max_frame_num=2))
    assert torch.equal(half.image_latent, full.image_latent)
    assert half.image_embedding.dtype == torch.float32
    assert 0 < (half.image_embedding - full.image_embedding).abs().max() < 0.1


def test_more_frames_decoded_together_than_the_service_allows_are_refused(preprocess: Preprocess, spec: ControlNeXtSpec):
    small = Preprocess(replace(preprocess.config, max_decode_chunk=4))
    assert len(small.encode(replace(spec, decode_chunk_size=4, max_frame_num=2)).poses) == 2
    refusal(small, replace(spec, decode_chunk_size=5), ValueTooLarge, "decode_chunk_size")


def test_progress_is_told_frame_by_frame(preprocess: Preprocess, spec: ControlNeXtSpec):
    told: list[Progress] = []
    preprocess.encode(spec, on_progress=told.append)
    assert told == [Progress("pose", done, DRIVING) for done in range(1, 1 + DRIVING)]


def test_a_stop_is_obeyed_within_one_frame(preprocess: Preprocess, spec: ControlNeXtSpec):
    told: list[Progress] = []
    with pytest.raises(Cancelled):
        preprocess.encode(spec, on_progress=told.append, should_stop=lambda: len(told) == 2)
    assert len(told) == 2


def refusal(preprocess: Preprocess, spec: ControlNeXtSpec, error: type[ModelError], field: str) -> str:
    with pytest.raises(error) as refused:
        preprocess.encode(spec)
    assert refused.value.loc == ("body", field)
    assert refused.value.status == 422
    return refused.value.message


def test_a_reference_image_that_cannot_be_used_is_named(preprocess: Preprocess, spec: ControlNeXtSpec, tmp_path: Path):
    path = tmp_path / "image"
    for data, error in (
        (b"text", UnsupportedImageFormat),
        (b"", UnsupportedImageFormat),
        (puppet_image(HEIGHT, WIDTH)[:2000], ImageLoadError),
        (puppet_image(60, 128), ImageTooSmall),
        (huge_png(), ImageTooLarge),
    ):
        path.write_bytes(data)
        refusal(preprocess, replace(spec, image=path), error, "image_url")


def test_a_reference_image_without_a_person_is_refused_before_the_video_is_read(
    preprocess: Preprocess, spec: ControlNeXtSpec, tmp_path: Path
):
    Image.new("RGB", (200, 200), "grey").save(tmp_path / "grey.png")
    told: list[Progress] = []
    with pytest.raises(PersonNotFound, match="reference image") as refused:
        preprocess.encode(replace(spec, image=tmp_path / "grey.png"), on_progress=told.append)
    assert refused.value.loc == ("body", "image_url")
    assert not told


def test_a_driving_video_that_cannot_be_used_is_named(preprocess: Preprocess, spec: ControlNeXtSpec, tmp_path: Path):
    path = tmp_path / "video.mp4"
    path.write_bytes(b"text in a file of another name")
    refusal(preprocess, replace(spec, video=path), UnsupportedVideoFormat, "video_url")
    path.write_bytes(spec.video.read_bytes()[:3000])
    refusal(preprocess, replace(spec, video=path), VideoLoadError, "video_url")
    grey_clip(path)
    assert "person" in refusal(preprocess, replace(spec, video=path), PersonNotFound, "video_url")
    short = Preprocess(replace(preprocess.config, max_video_s=0.5))
    refusal(short, spec, VideoTooLong, "video_url")


def test_after_every_refusal_the_next_request_is_served(preprocess: Preprocess, spec: ControlNeXtSpec, tmp_path: Path):
    for _ in range(3):
        refusal(preprocess, replace(spec, video=grey_clip(tmp_path / "grey.mp4")), PersonNotFound, "video_url")
    given: ControlNeXtConditioning = preprocess.encode(replace(spec, max_frame_num=3))
    assert len(given.poses) == 3


def test_a_size_that_the_nets_cannot_halve_is_our_own_mistake(preprocess: Preprocess, spec: ControlNeXtSpec):
    with pytest.raises(ValueError, match="not a multiple of 16"):
        preprocess.encode(replace(spec, height=100))
