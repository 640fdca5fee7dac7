"""A reference image and a driving video to tensors: the person's poses in the image's proportions, CLIP and VAE of the image.

People are detected in the video frame by frame, and only their skeletons are kept until the alignment is known. The published
code fits the alignment to every strided frame of the file, and so does `strict_reference`; else it is fitted to the frames that
are used, so that the rest need not be read (5j of `video-models.md`).
"""

from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.controlnext.checkpoint import load_image_encoder, load_vae, pose_folder, size_multiple
from engines.controlnext.config import ControlNeXtConfig, weights_of
from engines.controlnext.nets.clip_image import clip_pixels
from engines.controlnext.pose.align import fit, require_person
from engines.controlnext.pose.draw import draw
from engines.controlnext.pose.driver import alone
from engines.controlnext.pose.dwpose import DWPose
from engines.controlnext.pose.skeleton import Pose
from engines.controlnext.spec import IMAGE_FIELD, VIDEO_FIELD, ControlNeXtConditioning, ControlNeXtSpec
from engines.errors import ValueTooLarge, blamed_on
from engines.media.decoder import DECODER, DecodedVideo
from engines.media.image import load_cover
from engines.sampling import seeded_generator
from engines.spec import OnProgress, Progress, ShouldStop
from engines.stopping import stoppable

NOISE_STRENGTH = 0.02
"""Strength of the noise on the reference image before it is encoded; also the third added id."""

REFERENCE_IDS = (6.0, 128.0, NOISE_STRENGTH)
"""The added ids that the published code uses for every request (3B)."""


ALL_FRAMES = 1_000_000
"""More than a video of the longest duration holds."""


class Preprocess:
    """Holds DWPose, CLIP's image tower and the VAE's encoder."""

    def __init__(self, config: ControlNeXtConfig):
        DECODER.prepare()
        weights = weights_of(config)
        self.config = config
        self.size_multiple = size_multiple(weights)
        self.dwpose = DWPose(pose_folder(weights), config.device, config.threads)
        self.image_encoder = load_image_encoder(config)
        self.vae = load_vae(config, torch.float32).to(config.device)  # half precision overflows in this family's encoder
        del self.vae.decoder

    @torch.inference_mode()
    def encode(
        self, spec: ControlNeXtSpec, *, on_progress: OnProgress | None = None, should_stop: ShouldStop | None = None
    ) -> ControlNeXtConditioning:
        """Raises `ModelError` for media that cannot be used, with the field in its loc, and `Cancelled` between frames."""
        if spec.decode_chunk_size > (limit := self.config.max_decode_chunk):
            message = f"This service decodes at most {limit} frames together."
            raise ValueTooLarge(message, ("body", "decode_chunk_size"), {"le": limit})
        generator = seeded_generator(spec.seed)
        levels = self.levels(spec, should_stop)
        notes: list[str] = []
        poses = self._poses(spec, levels, notes, on_progress, should_stop)
        image = levels.float() / 255
        latent = self._latent(image, generator)
        ids = (spec.fps - 1.0, spec.motion_bucket_id, NOISE_STRENGTH)
        return ControlNeXtConditioning(
            seed=spec.seed,
            num_inference_steps=spec.num_inference_steps,
            guidance_scale=spec.guidance_scale,
            rng_state=generator.get_state(),
            notes=tuple(notes),
            poses=poses,
            image_embedding=self._embedding(image),
            image_latent=latent,
            added_ids=REFERENCE_IDS if spec.strict_reference else ids,
            batch_frames=spec.batch_frames,
            overlap=spec.overlap,
            controlnext_cond_scale=spec.controlnext_cond_scale,
            decode_chunk_size=spec.decode_chunk_size,
            fps=spec.fps,
        )

    def levels(self, spec: ControlNeXtSpec, should_stop: ShouldStop | None = None) -> Tensor:
        """(3, H, W) uint8: the reference image, covering the output's size. Everything that sees the image sees these levels."""
        if spec.height % self.size_multiple or spec.width % self.size_multiple:
            raise ValueError(f"{spec.width}x{spec.height} is not a multiple of {self.size_multiple} pixels")
        with blamed_on(IMAGE_FIELD):
            data, limit = spec.image.read_bytes(), self.config.max_image_pixels
            return load_cover(data, spec.height, spec.width, limit, should_stop=should_stop)

    def _poses(
        self,
        spec: ControlNeXtSpec,
        levels: Tensor,
        notes: list[str],
        on_progress: OnProgress | None,
        should_stop: ShouldStop | None,
    ) -> Tensor:
        """(N, 3, H, W) uint8: the reference's own pose, then the driving ones. notes: gets what the caller should know."""
        height, width = spec.height, spec.width
        reference = self.dwpose(levels.permute(1, 2, 0).numpy())
        require_person(reference)
        limits = (self.config.max_image_pixels, self.config.max_video_s)
        with blamed_on(VIDEO_FIELD), DECODER.video(spec.video, *limits, should_stop) as video:
            frames = _watched(video, spec, on_progress, should_stop)
            driving: Iterator[NDArray[Any]]
            if spec.video_is_pose:
                driving = (cv2.resize(frame, (width, height), interpolation=cv2.INTER_LINEAR) for frame in frames)
            else:
                driving = self._drawn(
                    reference, [self.dwpose(frame) for frame in frames], (video.height, video.width), spec, notes
                )
            # one array, filled frame by frame, so that its 425 MB (240 frames at 1024x576) do not exist twice
            poses = np.empty((spec.max_frame_num, height, width, 3), np.uint8)
            count = 0
            for pose in islice(chain((draw(reference, height, width),), driving), spec.max_frame_num):
                poses[count] = pose
                count += 1
            notes += video.notes
        return torch.from_numpy(poses[:count]).permute(0, 3, 1, 2)

    def _drawn(
        self, reference: Pose, found: list[Pose], frame_size: tuple[int, int], spec: ControlNeXtSpec, notes: list[str]
    ) -> Iterator[NDArray[np.uint8]]:
        """The driving poses, moved onto the reference's body. frame_size: (height, width) of the video."""
        size = (spec.height, spec.width)
        crowded = sum(pose.persons > 1 for pose in found)
        if crowded and not spec.strict_reference:
            notes.append(
                f"{crowded} of {len(found)} frames show several people: the one closest to the reference's size drives the video"
            )
            found = alone(found, reference, size, frame_size)
        alignment = fit(reference, found, size, frame_size)
        return (draw(alignment.apply(pose), *size) for pose in found)

    def _embedding(self, image: Tensor) -> Tensor:
        """(1, D) fp32: CLIP's projected embedding."""
        pixels = clip_pixels(image, self.image_encoder.config.image_size)
        return self.image_encoder(pixels.to(self.image_encoder.device, self.image_encoder.dtype)).image_embeds.float().cpu()

    def _latent(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """(4, h, w) fp32: the posterior's mean, unscaled, for the image with a little noise, which is a request's first draw."""
        noise = torch.randn((1, *image.shape), generator=generator)
        pixels = (2 * image - 1)[None] + NOISE_STRENGTH * noise
        return self.vae.encode(pixels.to(self.config.device)).latent_dist.mean[0].cpu()


def _watched(
    video: DecodedVideo, spec: ControlNeXtSpec, on_progress: OnProgress | None, should_stop: ShouldStop | None
) -> Iterator[NDArray[np.uint8]]:
    """The driving frames, as many as the output needs after the reference's own. Reports each to on_progress.

    With strict_reference all of the file, because the published code fits the alignment to them.
    """
    count = ALL_FRAMES if spec.strict_reference and not spec.video_is_pose else spec.max_frame_num - 1
    total = video.at_most(spec.sample_stride, count)
    for done, frame in enumerate(stoppable(video.frames(spec.sample_stride, count), should_stop), start=1):
        yield frame
        if on_progress is not None:
            on_progress(Progress("pose", done, max(total, done)))
