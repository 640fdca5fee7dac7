"""The request to ControlNeXt SVD, and what its stages pass to each other. No torch at import."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engines.spec import Conditioning, Latents, RenderSpec

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_FIELD, VIDEO_FIELD = "image_url", "video_url"
"""The request's fields for the two files, for error messages."""


@dataclass(frozen=True)
class ControlNeXtSpec(RenderSpec):
    """One video: the person of `image` moving like the one in `video`. Parameters: `video-models.md` section 3B.

    image: path of the reference image. video: path of the driving video. height, width: of the output, in pixels.
    max_frame_num: cap on the output's frames, the reference's own frame 0 included. batch_frames, overlap: of the windows.
    sample_stride: every n-th frame of the video is used. decode_chunk_size: frames that the VAE decodes together; changes pixels.
    fps: frame rate of the output; the model is also conditioned on it and on motion_bucket_id. controlnext_cond_scale: strength
    of the pose's influence. video_is_pose: the video already shows drawn poses, in this model's colours. strict_reference: as the
    published code, use the ids (6, 128, 0.02) whatever `fps` and `motion_bucket_id` are, fit the poses to all of the video, and
    draw everybody in it.
    """

    image: Path
    video: Path
    height: int = 1024
    width: int = 576
    max_frame_num: int = 240
    batch_frames: int = 24
    overlap: int = 6
    sample_stride: int = 2
    decode_chunk_size: int = 2
    motion_bucket_id: float = 127.0
    fps: int = 7
    controlnext_cond_scale: float = 1.0
    video_is_pose: bool = False
    strict_reference: bool = False


@dataclass(frozen=True)
class ControlNeXtConditioning(Conditioning):
    """poses: (N, 3, H, W), uint8, RGB; frame 0 is the reference's own. image_embedding: (1, D), fp32.

    image_latent: (4, H/8, W/8), fp32, not scaled. added_ids: (fps id, motion bucket, noise strength).
    """

    poses: Tensor
    image_embedding: Tensor
    image_latent: Tensor
    added_ids: tuple[float, float, float]
    batch_frames: int
    overlap: int
    controlnext_cond_scale: float
    decode_chunk_size: int
    fps: int


@dataclass(frozen=True)
class ControlNeXtLatents(Latents):
    """values: (1, 4, N, H/8, W/8). decode_chunk_size: frames decoded together. fps: of the file."""

    decode_chunk_size: int
    fps: int
