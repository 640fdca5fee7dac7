"""What a request asks of AnimateDiff's stages; see `engines.demand`. Sizes and times: `video-models.md` section 4."""

from engines.animatediff.config import AnimateDiffConfig
from engines.demand import Demand, UnitTimes, bytes_ratio, unet_bytes, vae_bytes
from engines.errors import ValueTooLarge

UNIT_TIMES: UnitTimes = (0.1, 0.094, 0.2)
"""A request's text and keyframes, a step without guidance, a clip's frames. The second is from `results/nvidia-h200.json`; the
third is what is left of its jobs of 4 steps; the first was never measured on a GPU."""

SIDE = 512
"""Of SD 1.5's frames, where the config does not set it."""
DENOISE_WEIGHTS, DECODE_WEIGHTS = 4.61e9, 0.17e9
"""Bytes in fp16: the UNet and both SparseCtrls; the VAE."""


def demand(*, steps: int, guidance_scale: float) -> Demand:
    """A clip's steps follow each other, so its denoising cannot be spread."""
    halves = 2 if guidance_scale > 1 else 1
    return Demand((1.0, float(steps * halves), 1.0))


def check_memory(config: AnimateDiffConfig, *, guidance_scale: float) -> None:
    """Raises `ValueTooLarge` if the request can never fit into a replica of `config.memory_bytes`."""
    if config.memory_bytes is None:
        return
    pixels, ratio = (config.height or SIDE) * (config.width or SIDE), bytes_ratio(config.dtype)
    room = config.memory_bytes - ratio * DENOISE_WEIGHTS - config.control_cache_bytes
    half = unet_bytes(config.num_frames * pixels, config)
    if guidance_scale > 1 and half <= room < 2 * half:
        message = "The memory of this service's GPUs is enough for a guidance_scale of 1 only."
        raise ValueTooLarge(message, ("body", "guidance_scale"), {"le": 1})
    if half > room or vae_bytes(pixels, config) > config.memory_bytes - ratio * DECODE_WEIGHTS:
        raise ValueTooLarge("The memory of this service's GPUs is not enough for a clip.", ("body",))
