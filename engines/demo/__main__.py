"""`python -m engines.demo`: trains the demo models, part by part, and writes them in the published layouts."""

import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from engines.demo.autoencoder import VaeTask
from engines.demo.frame_table import FrameTable, encode_table, normalise
from engines.demo.grammar import words
from engines.demo.motion_nets import load_tokenizer
from engines.demo.motion_tasks import ClipTask, ImageTask, decoder
from engines.demo.puppet_bank import embed, fill_bank
from engines.demo.puppet_nets import LATENT_SCALING, new_image_encoder
from engines.demo.puppet_tasks import PuppetTask
from engines.demo.temporal_autoencoder import TemporalVaeTask, scale_latents
from engines.demo.tokenizer import write_tokenizer
from engines.demo.training import Report, Run, averaged

PUPPETS = 640
"""In the bank; eight frames of each."""


def train_animatediff(folder: Path, report: Report) -> None:
    """All stages, each from where it was left."""
    _finish(Run(VaeTask(), folder), report)
    vae = averaged(VaeTask(), folder)
    kept = folder / "animatediff-latents.pt"
    if not kept.exists():
        report("encoding every frame of the grammar")
        table = normalise(vae, encode_table(vae))
        torch.save({"vae": vae.state_dict(), "table": table.values}, kept)
    state = torch.load(kept, weights_only=True)
    vae.load_state_dict(state["vae"])
    table = FrameTable(state["table"])
    write_tokenizer(folder / "tokenizer", words())
    tokenizer = load_tokenizer(folder / "tokenizer")
    _finish(Run(ImageTask(table, tokenizer, decoder(vae)), folder), report)
    clips = ClipTask(table, tokenizer, decoder(vae))
    run = Run(clips, folder, start=lambda: clips.begin(averaged(ImageTask(table, tokenizer, decoder(vae)), folder)))
    _finish(run, report)


def _finish(run: Run, report: Report) -> None:
    if not run.done:
        run.train(report)
        run.sheet(report)


def train_controlnext(folder: Path, report: Report) -> None:
    """All stages, each from where it was left."""
    _finish(Run(TemporalVaeTask(), folder), report)
    _finish(Run(puppet_task(folder, report), folder), report)


def puppet_task(folder: Path, report: Report) -> PuppetTask:
    """With its bank filled, and the VAE's latents scaled to unit variance."""
    vae = averaged(TemporalVaeTask(), folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = new_image_encoder().requires_grad_(False).eval()
    bank = fill_bank(folder / "controlnext-bank", PUPPETS, vae, encoder, report)
    scaled = scale_latents(vae, bank.latents.flatten(0, 1)).unflatten(0, bank.latents.shape[:2]) * LATENT_SCALING

    def encode(images: Tensor) -> tuple[Tensor, Tensor]:
        return vae.encode(2 * images - 1).latent_dist.mean * LATENT_SCALING, embed(encoder, images)

    def decode(latents: Tensor) -> Tensor:
        pairs = [vae.decode(part, num_frames=len(part)).sample for part in (latents / LATENT_SCALING).split(2)]
        return (torch.cat(pairs) / 2 + 0.5).clamp(0, 1)

    return PuppetTask(replace(bank, latents=scaled), encode, decode)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"animatediff": train_animatediff, "controlnext": train_controlnext}[sys.argv[1]](
        Path(sys.argv[2]), lambda line: print(time.strftime("%H:%M:%S"), line, flush=True)
    )
