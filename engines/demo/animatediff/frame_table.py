"""The latents of every frame that the grammar can show, so that training never has to draw or encode.

They are the posterior's means, never samples: its noise would be a floor under the diffusion loss. The VAE's quantising
convolutions take over a shift and a scale, after which latents have mean 0 and variance 1 at the scaling factor 0.18215.
"""

from collections.abc import Sequence
from itertools import product

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from engines.demo.animatediff.draw import images
from engines.demo.animatediff.grammar import ACROSS, ALONG, BACKGROUNDS, CENTRE, COLOURS, FRAMES, MOTIONS, SHAPES, Scene

SCALING = 0.18215
_BATCH = 64

_LOOKS = {parts: i for i, parts in enumerate(product(SHAPES, COLOURS, BACKGROUNDS))}
_PATHS = [Scene(motion=motion, along=along, across=across) for motion, along, across in product(MOTIONS, ALONG, ACROSS)]
_PLACES = {
    place: i
    for i, place in enumerate(sorted({(CENTRE, CENTRE), *(scene.centre(frame) for scene in _PATHS for frame in range(FRAMES))}))
}


class FrameTable:
    """values: (looks, places, 4, 8, 8), unit variance."""

    def __init__(self, values: Tensor):
        self.values = values

    def frames(self, scenes: Sequence[Scene], frames: Sequence[int]) -> Tensor:
        """(N, 4, 8, 8): a frame of each scene."""
        looks = [_LOOKS[scene.shape, scene.colour, scene.background] for scene in scenes]
        places = [_PLACES[scene.centre(frame)] for scene, frame in zip(scenes, frames, strict=True)]
        return self.values[looks, places]

    def clips(self, scenes: Sequence[Scene]) -> Tensor:
        """(B, 4, 16, 8, 8)."""
        every = self.frames([scene for scene in scenes for _ in range(FRAMES)], [*range(FRAMES)] * len(scenes))
        return every.unflatten(0, (-1, FRAMES)).transpose(1, 2)


@torch.inference_mode()
def encode_table(vae: AutoencoderKL) -> FrameTable:
    """All frames, in about two minutes."""
    everywhere, looks = list(_PLACES), []
    for shape, colour, background in _LOOKS:
        scene = Scene(shape=shape, colour=colour, background=background)
        parts = [
            vae.encode(2 * images([scene] * len(places), places) - 1).latent_dist.mean * SCALING
            for places in (everywhere[i : i + _BATCH] for i in range(0, len(everywhere), _BATCH))
        ]
        looks.append(torch.cat(parts))
    return FrameTable(torch.stack(looks))


@torch.no_grad()
def normalise(vae: AutoencoderKL, table: FrameTable) -> FrameTable:
    """Fold the table's mean and deviation by channel into the VAE, exactly. Returns the table that the changed VAE would give."""
    std, mean = torch.std_mean(table.values, dim=(0, 1, 3, 4))
    shift, gain = mean / SCALING, 1 / std  # of the latents before scaling: z' = (z - shift) * gain
    into, out_of = vae.quant_conv, vae.post_quant_conv
    into.bias[:4] = (into.bias[:4] - shift) * gain
    into.weight[:4] *= gain[:, None, None, None]
    into.bias[4:] += 2 * gain.log()
    out_of.bias += (out_of.weight[:, :, 0, 0] * shift).sum(dim=1)
    out_of.weight /= gain[None, :, None, None]
    return FrameTable((table.values - mean[:, None, None]) / std[:, None, None])
