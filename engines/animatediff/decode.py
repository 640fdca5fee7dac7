"""Latents to an mp4: the VAE decodes a few frames at a time, and the encoder takes them as they come."""

from typing import Any

from torch import Tensor

from engines.animatediff.checkpoint import load_vae, weights_of
from engines.animatediff.config import AnimateDiffConfig
from engines.checkpoints.weights import torch_dtype
from engines.diffusion.frame_decoder import FrameDecoder
from engines.diffusion.vae import fuse
from engines.media.video import Frames, encode_h264
from engines.spec import Clip, Latents, OnProgress, ShouldStop
from engines.stopping import stoppable


class Decode:
    """Holds the VAE's decoder."""

    def __init__(self, config: AnimateDiffConfig):
        self.config = config
        self.vae = load_vae(weights_of(config), torch_dtype(config.dtype)).to(config.device)
        del self.vae.encoder, self.vae.quant_conv  # only the preprocess stage needs them
        fuse(self.vae.decoder)
        self.decoder = FrameDecoder(self.vae, call_vae, config.decode_chunk)

    def frames(self, latents: Latents) -> Frames:
        """See `FrameDecoder.frames`. Each frame is decoded independently."""
        return self.decoder.frames(latents.values)

    def decode(self, latents: Latents, *, on_progress: OnProgress | None = None, should_stop: ShouldStop | None = None) -> Clip:
        """The clip as a file, at the config's frame rate. on_progress: not called, because the frames are few."""
        height, width = self.decoder.size(latents.values)
        mp4, num_frames = encode_h264(stoppable(self.frames(latents), should_stop), height, width, self.config.fps)
        return Clip(mp4, num_frames, height, width, self.config.fps, latents.seed, engine=latents.engine)


def call_vae(vae: Any, latents: Tensor, in_chunk: int) -> Tensor:
    """See `CallVAE`. This VAE decodes every frame independently, so it ignores `in_chunk`."""
    return vae.decode(latents).sample
