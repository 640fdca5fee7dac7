"""Puppets for training: latents, joints and image embeddings, encoded once, in parts that survive a kill."""

import os
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLTemporalDecoder
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from engines.controlnext.nets.clip_image import clip_pixels
from engines.demo.controlnext.puppets import build_of, pictures, random_moves, random_puppet, stances
from engines.demo.training import Report

FRAMES = 8
"""Of an entry: one of the puppet's own body, the others of a slightly different one, as a driving person's is."""

_PART = 16
_BATCH = 4


@dataclass(frozen=True)
class PuppetBank:
    """latents: (E, 8, 16, 16, 16), frames before channels, as the VAE gives them. joints: (E, 8, 17, 2), in pixels.

    embeddings: (E, 8, 32), of the images.
    """

    latents: Tensor
    joints: Tensor
    embeddings: Tensor


def fill_bank(
    folder: Path,
    entries: int,
    vae: AutoencoderKLTemporalDecoder,
    encoder: CLIPVisionModelWithProjection,
    report: Report,
) -> PuppetBank:
    """All entries. Those that `folder` holds are not made again."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for start in range(0, entries, _PART):
        path = folder / f"{start:05d}.pt"
        if not path.exists():
            made = [_entry(start + i, vae, encoder) for i in range(_PART)]
            draft = path.with_suffix(".draft")
            torch.save([torch.stack(values) for values in zip(*made, strict=True)], draft)
            os.replace(draft, path)
            report(f"encoded {start + _PART} of {entries} puppets")
        parts.append(torch.load(path, weights_only=True))
    return PuppetBank(*(torch.cat(values) for values in zip(*parts, strict=True)))


@torch.inference_mode()
def _entry(seed: int, vae: AutoencoderKLTemporalDecoder, encoder: CLIPVisionModelWithProjection) -> tuple[Tensor, Tensor, Tensor]:
    dice = random.Random(seed)
    puppet, moves = random_puppet(dice), random_moves(dice)
    start = dice.uniform(0, 100)
    own, driver = stances(puppet, random_moves(dice), (start,)), build_of(puppet, dice)
    joints = [*own, *stances(driver, moves, [start + i for i in range(1, FRAMES)])]
    frames = pictures(puppet, joints)
    with torch.autocast("cpu", torch.bfloat16):
        latents = torch.cat([vae.encode(2 * part - 1).latent_dist.mean.float() for part in frames.split(_BATCH)])
    return latents, torch.from_numpy(np.stack(joints)).float(), embed(encoder, frames)


def embed(encoder: CLIPVisionModelWithProjection, images: Tensor) -> Tensor:
    """(N, 32): the served model's image embedding."""
    pixels = torch.cat([clip_pixels(image, encoder.config.image_size) for image in images])
    return encoder(pixels).image_embeds
