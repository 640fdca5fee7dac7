"""What a request asks of ControlNeXt's stages; see `engines.demand`. Sizes and times: `video-models.md` sections 4 and 7."""

from engines.controlnext.config import ControlNeXtConfig
from engines.controlnext.windows import windows
from engines.demand import Demand, UnitTimes, bytes_ratio, unet_bytes, vae_bytes
from engines.errors import ValueTooLarge

FULL_FRAME, FULL_WINDOW = 1024 * 576, 24
"""Pixels of a frame and frames of a window at the API's defaults. The units are counted in these."""
UNIT_TIMES: UnitTimes = (0.1, 0.19, 0.1)
"""A frame's poses, a unit at the defaults, a decoded frame. The second is from `results/nvidia-h200.json`; the third is what is
left of its jobs of 25 frames and 4 steps; the first was never measured on a GPU."""

DENOISE_WEIGHTS, DECODE_WEIGHTS = 3.06e9, 0.2e9
"""Bytes in fp16."""
PREFIX_BYTES, MAP_BYTES = 126.0, 2.5
"""Of a pixel of each frame: the control net's part that is the same at every step, and its maps at one step."""


def demand(*, height: int, width: int, frames: int, batch_frames: int, overlap: int, steps: int, guidance_scale: float) -> Demand:
    """frames: the most that the output may have. A shorter driving video gives fewer: the measured times even that out."""
    cut = windows(frames, batch_frames, overlap)
    halves = 1 if guidance_scale == 1 else 2
    share = height * width / FULL_FRAME
    units = halves * steps * share * sum(window.stop - window.start for window in cut) / FULL_WINDOW
    return Demand((float(frames), units, frames * share), halves * len(cut))


def check_memory(
    config: ControlNeXtConfig, *, height: int, width: int, frames: int, batch_frames: int, decode_chunk_size: int
) -> None:
    """Raises `ValueTooLarge` if the request can never fit into a replica of `config.memory_bytes`."""
    if config.memory_bytes is None:
        return
    pixels, ratio = height * width, bytes_ratio(config.dtype)
    prefixes = min(config.control_cache_bytes, frames * pixels * PREFIX_BYTES * ratio)
    for_windows = config.memory_bytes - ratio * (DENOISE_WEIGHTS + frames * pixels * MAP_BYTES) - prefixes
    for_chunks = config.memory_bytes - ratio * DECODE_WEIGHTS
    for field, asked, room, of_frame in (
        ("batch_frames", min(batch_frames, frames), for_windows, unet_bytes(pixels, config)),
        ("decode_chunk_size", min(decode_chunk_size, frames), for_chunks, vae_bytes(pixels, config)),
    ):
        if asked * of_frame > room:
            limit = max(0, int(room // of_frame))
            message = f"At {width}x{height} the memory of this service's GPUs is enough for {limit} frames together."
            raise ValueTooLarge(message, ("body", field if limit else "height"), {"le": limit} if limit else None)
