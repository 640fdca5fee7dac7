"""The whole algorithm from files to latents beside the published one (`published.py`, `reference.py`), on the same weights."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_video_diffusion import pipeline_stable_video_diffusion as svd
from PIL import Image

from engines.controlnext.checkpoint import load_image_encoder, load_vae, pose_folder
from engines.controlnext.config import ControlNeXtConfig, ControlNeXtWeights
from engines.controlnext.demo_pose import puppet_image, write_puppet_clip
from engines.controlnext.denoise import Denoise
from engines.controlnext.preprocess import Preprocess
from engines.controlnext.spec import ControlNeXtSpec
from engines.media.image import load_cover
from engines.sampling import seeded_generator
from tests.engines.controlnext import published, reference
from tests.engines.controlnext.conftest import reference_nets

STRIDE = 2
CASES = [  # the picture's size, the video's, the output's (height, width each), the frames asked for
    ((192, 128), (256, 320), (96, 64), 240),
    ((256, 300), (200, 360), (64, 96), 5),
]


@pytest.mark.parametrize(("picture", "video", "size", "max_frame_num"), CASES)
def test_poses_are_equal_and_latents_within_a_ten_thousandth(
    controlnext_weights: ControlNeXtWeights,
    denoise: Denoise,
    tmp_path: Path,
    picture: tuple[int, int],
    video: tuple[int, int],
    size: tuple[int, int],
    max_frame_num: int,
):
    image, clip, (height, width) = tmp_path / "image.png", tmp_path / "clip.mp4", size
    image.write_bytes(puppet_image(*picture))
    write_puppet_clip(clip, 13, *video, 14)
    config = ControlNeXtConfig(weights=controlnext_weights, threads=1)
    spec = ControlNeXtSpec(
        *(5, 3, 3.0, image, clip),
        height=height,
        width=width,
        sample_stride=STRIDE,
        max_frame_num=max_frame_num,
        batch_frames=6,
        overlap=2,
        strict_reference=True,
    )
    given = Preprocess(config).encode(spec)
    pixels, poses = published_poses(controlnext_weights, spec)
    assert len(poses) == min(max_frame_num, 8)
    np.testing.assert_array_equal(given.poses.permute(0, 2, 3, 1).numpy(), poses)

    generator = seeded_generator(spec.seed)
    levels = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 * 2 - 1
    noise = torch.randn((1, 3, height, width), generator=generator)
    latent = reference.image_latent(load_vae(config, torch.float32), levels, noise[0])
    seen = (svd._resize_with_antialiasing(levels[None], (224, 224)) + 1) / 2
    mean, std = (torch.tensor(t)[:, None, None] for t in (reference.CLIP_MEAN, reference.CLIP_STD))
    embedding = load_image_encoder(config)((seen - mean) / std).image_embeds
    first = torch.randn((1, len(poses), 4, height // 8, width // 8), generator=generator)
    expected = reference.sample(
        *reference_nets(controlnext_weights),
        torch.from_numpy(poses).permute(0, 3, 1, 2),
        latent,
        embedding,
        first,
        steps=3,
        guidance=3.0,
        batch_frames=6,
        overlap=2,
        ids=(6.0, 128.0, 0.02),
    )
    ours = denoise.sample(given).values.transpose(1, 2)
    assert expected.std() > 0.1
    assert (ours - expected).abs().max() <= 1e-4


@pytest.mark.parametrize(("picture", "size"), [((87, 84), (64, 448)), ((200, 133), (192, 128)), ((64, 300), (256, 64))])
def test_the_picture_has_the_published_levels(tmp_path: Path, picture: tuple[int, int], size: tuple[int, int]):
    """Of the first, the published code's rounded ratio makes one row more than the exact one would.

    A value in 100,000 lies so near a half that torch's `interpolate`, which adds in another order, rounds it to the next level.
    """
    levels = np.random.default_rng(0).integers(0, 256, (*picture, 3), np.uint8)
    Image.fromarray(levels).save(tmp_path / "image.png")
    ours = load_cover((tmp_path / "image.png").read_bytes(), *size, 10**6)
    apart = ours.permute(1, 2, 0).numpy().astype(int) - published.reference_pixels(tmp_path / "image.png", *size)
    assert np.abs(apart).max() <= 1
    assert np.count_nonzero(apart) <= 1e-4 * apart.size


def published_poses(weights: ControlNeXtWeights, spec: ControlNeXtSpec) -> tuple[np.ndarray, np.ndarray]:
    """The reference image (H, W, 3) and the poses (N, H, W, 3), both uint8."""
    detect = published.Detector(pose_folder(weights))
    pixels = published.reference_pixels(spec.image, spec.height, spec.width)
    with av.open(str(spec.video)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)][::STRIDE]
    own, found = detect(pixels), [detect(frame) for frame in frames]
    moved = published.aligned(own, pixels.shape[:2], found, frames[0].shape[:2])
    poses = [published.drawn(each, spec.height, spec.width) for each in (own, *moved)]
    return pixels, np.stack(poses[: spec.max_frame_num])
