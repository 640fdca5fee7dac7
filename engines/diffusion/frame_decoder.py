"""Decodes latents to frames for both models, some at a time, so that memory does not grow with the number of frames.

A *chunk* is the frames that must be decoded together. A temporal VAE mixes the frames of a chunk, so the request fixes its size;
for a VAE that decodes each frame independently, a chunk is one frame. A *batch* is the chunks in one call of the VAE. Its size
changes no pixel, except by rounding: the chunks of a batch are independent, and only chunks that failed are decoded again.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from engines.errors import GenerationFailed
from engines.media.pixels import to_levels
from engines.media.video import Frames

logger = logging.getLogger(__name__)

CallVAE = Callable[[Any, Tensor, int], Tensor]
"""A VAE, latents (n, 4, h, w) of its dtype, frames in each chunk -> pixels, (n, 3, H, W), about [-1, 1]."""


class FrameDecoder:
    """vae: one of diffusers' classes, on its device. batch_frames: frames in one call of it, if more than one chunk fits.

    Half precision sometimes overflows, which would show as black frames: such a chunk is decoded again in fp32. If a batch does
    not fit into the device's memory, it and all later ones of the clip are decoded chunk by chunk.
    """

    def __init__(self, vae: Any, call: CallVAE, batch_frames: int):
        self.vae, self.call, self.batch_frames = vae, call, batch_frames

    def size(self, latents: Tensor) -> tuple[int, int]:
        """Height and width of the frames, in pixels. latents: (..., h, w)."""
        scale = 2 ** (len(self.vae.config.block_out_channels) - 1)
        height, width = latents.shape[-2:]
        return height * scale, width * scale

    def frames(self, latents: Tensor, chunk_frames: int = 1) -> Frames:
        """Batches of whole chunks, (n, H, W, 3) uint8 RGB. latents: (1, 4, F, h, w), of unit variance.

        Raises `GenerationFailed` for a chunk that is not finite in fp32 either.
        """
        fits = True
        for batch, in_chunk in _batches(latents[0].transpose(0, 1), chunk_frames, self.batch_frames):
            with torch.inference_mode():
                scaled = batch.to(self.vae.device) / self.vae.config.scaling_factor
                pixels = self._decoded(scaled, in_chunk) if fits else None
                fits = pixels is not None
                if pixels is None:
                    pixels = torch.cat(
                        [self.call(self.vae, chunk, in_chunk) for chunk in scaled.to(self.vae.dtype).split(in_chunk)]
                    )
                levels = to_levels(self._finite(pixels, scaled, in_chunk))
            yield levels

    def _decoded(self, batch: Tensor, in_chunk: int) -> Tensor | None:
        """(n, 3, H, W), or None if a batch of several chunks does not fit into the device's memory."""
        try:
            return self.call(self.vae, batch.to(self.vae.dtype), in_chunk)
        except torch.OutOfMemoryError:
            if len(batch) <= in_chunk:
                raise
            logger.warning("decoding chunk by chunk", extra={"action": "decode_batch_too_large", "frames": len(batch)})
            return None  # the caller goes on outside this handler, whose traceback keeps the memory of the failed call

    def _finite(self, pixels: Tensor, batch: Tensor, in_chunk: int) -> Tensor:
        """The pixels; a chunk that is not finite is decoded again in fp32. batch: their latents, scaled."""
        if pixels.isfinite().all():
            return pixels
        if self.vae.dtype not in (torch.float16, torch.bfloat16):
            raise GenerationFailed
        chunks = list(zip(pixels.float().split(in_chunk), batch.split(in_chunk), strict=True))
        failed = [not seen.isfinite().all() for seen, _ in chunks]
        fields = {"dtype": str(self.vae.dtype).removeprefix("torch."), "chunks": sum(failed), "of": len(chunks)}
        logger.warning("decoding again in fp32", extra={"action": "decode_retry", **fields})
        return torch.cat([self._in_fp32(latents) if bad else seen for bad, (seen, latents) in zip(failed, chunks, strict=True)])

    def _in_fp32(self, chunk: Tensor) -> Tensor:
        pixels = self.call(self._precise_vae, chunk.float(), len(chunk))
        if not pixels.isfinite().all():
            raise GenerationFailed
        return pixels

    @cached_property
    def _precise_vae(self) -> Any:
        return copy.deepcopy(self.vae).float()


def _batches(latents: Tensor, chunk_frames: int, batch_frames: int) -> Iterator[tuple[Tensor, int]]:
    """(frames, frames in each of its chunks): as many whole chunks as a batch may hold, then the shorter last one."""
    whole = len(latents) - len(latents) % chunk_frames
    for batch in latents[:whole].split(max(1, batch_frames // chunk_frames) * chunk_frames) if whole else ():
        yield batch, chunk_frames
    if whole < len(latents):
        yield latents[whole:], len(latents) - whole
