"""Latents to an mp4: the VAE decodes a few frames at a time, and the encoder takes them as they come."""

import torch

from engines.animatediff.checkpoint import load_vae, weights_of
from engines.animatediff.config import AnimateDiffConfig
from engines.errors import GenerationFailed
from engines.media.pixels import to_levels
from engines.media.video import Frames, encode_h264
from engines.spec import Clip, Latents, OnProgress, ShouldStop
from engines.stopping import stoppable
from engines.vae import fuse
from engines.weights import torch_dtype


class Decode:
    """Holds the VAE's decoder."""

    def __init__(self, config: AnimateDiffConfig):
        self.config = config
        self.vae = load_vae(weights_of(config), torch_dtype(config.dtype)).to(config.device)
        del self.vae.encoder, self.vae.quant_conv  # the preprocess stage's
        fuse(self.vae.decoder)

    def frames(self, latents: Latents) -> Frames:
        """Chunks of (n, H, W, 3) uint8 RGB. Frames do not see each other, so any chunking gives the same pixels.

        Raises `GenerationFailed` on non-finite values.
        """
        values = latents.values[0].transpose(0, 1) / self.vae.config.scaling_factor  # (F, 4, h, w)
        for chunk in values.split(self.config.decode_chunk):
            with torch.inference_mode():
                pixels = self.vae.decode(chunk.to(self.config.device, torch_dtype(self.config.dtype))).sample
                if not pixels.isfinite().all():
                    raise GenerationFailed
            yield to_levels(pixels)

    def decode(self, latents: Latents, *, on_progress: OnProgress | None = None, should_stop: ShouldStop | None = None) -> Clip:
        """The clip as a file, at the config's frame rate. on_progress: not called, for these few frames."""
        scale = 2 ** (len(self.vae.config.block_out_channels) - 1)
        height, width = (size * scale for size in latents.values.shape[-2:])
        mp4, num_frames = encode_h264(stoppable(self.frames(latents), should_stop), height, width, self.config.fps)
        return Clip(mp4, num_frames, height, width, self.config.fps, latents.seed, engine=latents.engine)
