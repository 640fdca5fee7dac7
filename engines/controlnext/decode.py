"""Latents to an mp4: the temporal VAE decodes chunk by chunk, and the encoder takes the frames as they come.

The decoder's convolutions and norms see the frames of a chunk together, so another `decode_chunk_size` gives other pixels
and it is never altered; several chunks in one batch do not see each other (5i).
"""

import copy
import logging
from collections.abc import Iterator
from functools import cached_property

import torch
from diffusers import AutoencoderKLTemporalDecoder
from torch import Tensor

from engines.controlnext.checkpoint import load_vae
from engines.controlnext.config import ControlNeXtConfig
from engines.controlnext.spec import ControlNeXtLatents
from engines.errors import GenerationFailed
from engines.media.pixels import to_levels
from engines.media.video import Frames, encode_h264
from engines.spec import Clip, OnProgress, Progress, ShouldStop
from engines.stopping import stoppable
from engines.weights import torch_dtype

logger = logging.getLogger(__name__)


class Decode:
    """Holds the VAE's decoder."""

    def __init__(self, config: ControlNeXtConfig):
        self.config = config
        self.vae = load_vae(config, torch_dtype(config.dtype)).to(config.device)
        del self.vae.encoder, self.vae.quant_conv  # the preprocess stage's

    def frames(self, latents: ControlNeXtLatents) -> Frames:
        """Batches of whole chunks, (n, H, W, 3) uint8 RGB. Raises `GenerationFailed` on values that fp32 cannot mend."""
        values = latents.values[0].transpose(0, 1)  # (N, 4, h, w)
        for batch, chunk in self._batches(values, latents.decode_chunk_size):
            with torch.inference_mode():
                frames = to_levels(self._pixels(batch, chunk))
            yield frames

    def decode(
        self, latents: ControlNeXtLatents, *, on_progress: OnProgress | None = None, should_stop: ShouldStop | None = None
    ) -> Clip:
        """The video as a file, at the rate that was asked for."""
        scale = 2 ** (len(self.vae.config.block_out_channels) - 1)
        height, width = (size * scale for size in latents.values.shape[-2:])
        total = latents.values.shape[2]

        def watched() -> Frames:
            done = 0
            for batch in stoppable(self.frames(latents), should_stop):
                yield batch
                done += len(batch)
                if on_progress is not None:
                    on_progress(Progress("frame", done, total))

        mp4, num_frames = encode_h264(watched(), height, width, latents.fps)
        return Clip(mp4, num_frames, height, width, latents.fps, latents.seed, engine=latents.engine)

    def _batches(self, values: Tensor, chunk: int) -> Iterator[tuple[Tensor, int]]:
        """(frames, frames in each of its chunks): as many whole chunks as a batch may hold, then the shorter last one."""
        whole = len(values) - len(values) % chunk
        per_batch = max(1, self.config.decode_batch_frames // chunk) * chunk
        for batch in values[:whole].split(per_batch) if whole else ():
            yield batch, chunk
        if whole < len(values):
            yield values[whole:], len(values) - whole

    def _pixels(self, batch: Tensor, chunk: int) -> Tensor:
        """(n, 3, H, W), about [-1, 1]: the batch at once, or chunk by chunk if the device has not the memory."""
        batch = batch.to(self.config.device) / self.vae.config.scaling_factor
        try:
            return self._decoded(batch, chunk)
        except torch.OutOfMemoryError:
            if len(batch) <= chunk:
                raise
            logger.warning("decoding chunk by chunk", extra={"action": "decode_batch_too_large", "frames": len(batch)})
        return torch.cat([self._decoded(part, chunk) for part in batch.split(chunk)])

    def _decoded(self, batch: Tensor, chunk: int) -> Tensor:
        """Half precision overflows at times, which shows as black frames: fp32 has the last word."""
        pixels: Tensor = self.vae.decode(batch.to(self.vae.dtype), num_frames=chunk).sample
        if pixels.isfinite().all():
            return pixels
        if self.vae.dtype in (torch.float16, torch.bfloat16):
            logger.warning("decoding again in fp32", extra={"action": "decode_retry", "dtype": self.config.dtype})
            pixels = self._precise_vae.decode(batch, num_frames=chunk).sample
            if pixels.isfinite().all():
                return pixels
        raise GenerationFailed

    @cached_property
    def _precise_vae(self) -> AutoencoderKLTemporalDecoder:
        return copy.deepcopy(self.vae).float()
