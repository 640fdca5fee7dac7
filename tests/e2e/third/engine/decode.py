from typing import Any

import numpy as np

from engines.media.video import encode_h264
from engines.solid.config import SolidConfig
from engines.spec import Clip, Latents


class Decode:
    def __init__(self, config: SolidConfig):
        pass

    def decode(self, latents: Latents, **_: Any) -> Clip:
        grey = latents.values[0, 0].numpy().astype(np.uint8).repeat(8, axis=1).repeat(8, axis=2)  # (F, 64, 64)
        mp4, frames = encode_h264(iter([np.stack([grey] * 3, axis=-1)]), 64, 64, 8)
        return Clip(mp4, frames, 64, 64, 8, latents.seed)
