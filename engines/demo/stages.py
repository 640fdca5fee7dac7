"""Trains each demo model stage by stage, every stage from where it was left, and writes the checkpoint at the end.

`folder` keeps a folder a stage: its state, its curve, its sample sheets. A finished stage is not repeated.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder
from torch import Tensor
from transformers import CLIPTokenizer, CLIPVisionModelWithProjection

from engines.demo.animatediff.autoencoder import VaeTask
from engines.demo.animatediff.frame_table import FrameTable, encode_table, normalise
from engines.demo.animatediff.grammar import words
from engines.demo.animatediff.nets import load_tokenizer
from engines.demo.animatediff.tasks import ClipTask, ImageTask, decoder
from engines.demo.animatediff.tokenizer import write_tokenizer
from engines.demo.controlnext.autoencoder import TemporalVaeTask, scale_latents
from engines.demo.controlnext.bank import embed, fill_bank
from engines.demo.controlnext.nets import LATENT_SCALING, new_image_encoder
from engines.demo.controlnext.tasks import PuppetTask
from engines.demo.export import write_animatediff, write_controlnext
from engines.demo.training import Report, Run, Task, averaged

PUPPETS = 640
"""In the bank; eight frames of each."""


def train_animatediff(folder: Path, out: Path, report: Report, device: str) -> None:
    """VAE, single images, clips; then the checkpoint, in place of what `out` holds."""
    finish(VaeTask(), folder, report, device)
    vae, table, tokenizer = latent_space(folder, report)
    images, clips = ImageTask(table, tokenizer, decoder(vae)), ClipTask(table, tokenizer, decoder(vae))
    finish(images, folder, report, device)
    _train(Run(clips, folder, device=device, start=lambda: clips.begin(averaged(images, folder))), report)
    _replace(out, lambda draft: write_animatediff(draft, vae.cpu(), averaged(clips, folder).cpu()))
    report(f"animatediff: written to {out}")


def train_controlnext(folder: Path, out: Path, report: Report, device: str) -> None:
    """VAE, clips; then the checkpoint, in place of what `out` holds."""
    finish(TemporalVaeTask(), folder, report, device)
    task, vae, encoder = puppet_task(folder, report)
    finish(task, folder, report, device)
    _replace(out, lambda draft: write_controlnext(draft, vae, encoder, averaged(task, folder).cpu()))
    report(f"controlnext: written to {out}")


def latent_space(folder: Path, report: Report) -> tuple[AutoencoderKL, FrameTable, CLIPTokenizer]:
    """The trained VAE with latents of unit variance, the table of all frames' latents, and the tokenizer."""
    vae, kept = averaged(VaeTask(), folder), folder / "animatediff-latents.pt"
    if not kept.exists():
        report("encoding every frame of the grammar")
        table = normalise(vae, encode_table(vae))
        draft = kept.with_suffix(".draft")
        torch.save({"vae": vae.state_dict(), "table": table.values}, draft)
        os.replace(draft, kept)
    state = torch.load(kept, weights_only=True)
    vae.load_state_dict(state["vae"])
    write_tokenizer(folder / "tokenizer", words())
    return vae, FrameTable(state["table"]), load_tokenizer(folder / "tokenizer")


def puppet_task(folder: Path, report: Report) -> tuple[PuppetTask, AutoencoderKLTemporalDecoder, CLIPVisionModelWithProjection]:
    """The task with its bank filled, the trained VAE with latents of unit variance, and the random image encoder."""
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

    return PuppetTask(replace(bank, latents=scaled), encode, decode), vae, encoder


def finish(task: Task, folder: Path, report: Report, device: str) -> None:
    """Make the steps of a stage that are left."""
    _train(Run(task, folder, device=device), report)


def _train(run: Run, report: Report) -> None:
    if not run.done:
        run.train(report)
        run.sheet(report)


def _replace(out: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a folder, which then takes the place of `out`."""
    draft = out.with_name(f".{out.name}-new")
    shutil.rmtree(draft, ignore_errors=True)
    write(draft)
    shutil.rmtree(out, ignore_errors=True)
    draft.rename(out)
