"""Latents to an mp4: the temporal VAE decodes chunk by chunk, and the encoder takes the frames as they come.

The decoder's convolutions and norms mix the frames of a chunk, so another `decode_chunk_size` gives other pixels: the request's
is never altered. Several chunks in one batch are decoded independently (5i).
"""

from typing import Any

from torch import Tensor

from engines.checkpoints.weights import torch_dtype
from engines.controlnext.checkpoint import load_vae
from engines.controlnext.config import ControlNeXtConfig
from engines.controlnext.spec import ControlNeXtLatents
from engines.diffusion.frame_decoder import FrameDecoder
from engines.media.video import Frames, encode_h264
from engines.spec import Clip, OnProgress, Progress, ShouldStop
from engines.stopping import stoppable


class Decode:
    """Holds the VAE's decoder."""

    def __init__(self, config: ControlNeXtConfig):
        self.config = config
        self.vae = load_vae(config, torch_dtype(config.dtype)).to(config.device)
        del self.vae.encoder, self.vae.quant_conv  # only the preprocess stage needs them
        self.decoder = FrameDecoder(self.vae, call_vae, config.decode_batch_frames)

    def frames(self, latents: ControlNeXtLatents) -> Frames:
        """See `FrameDecoder.frames`."""
        return self.decoder.frames(latents.values, latents.decode_chunk_size)

    def decode(
        self, latents: ControlNeXtLatents, *, on_progress: OnProgress | None = None, should_stop: ShouldStop | None = None
    ) -> Clip:
        """The video as a file, at the requested frame rate."""
        height, width = self.decoder.size(latents.values)
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


def call_vae(vae: Any, latents: Tensor, in_chunk: int) -> Tensor:
    """See `CallVAE`."""
    return vae.decode(latents, num_frames=in_chunk).sample
