"""`python -m engines.demo`: trains the demo models, part by part, and writes them in the published layouts."""

import sys
import time
from pathlib import Path

import torch

from engines.demo.autoencoder import VaeTask
from engines.demo.frame_table import FrameTable, encode_table, normalise
from engines.demo.grammar import words
from engines.demo.motion_nets import load_tokenizer
from engines.demo.motion_tasks import ClipTask, ImageTask, decoder
from engines.demo.temporal_autoencoder import TemporalVaeTask
from engines.demo.tokenizer import write_tokenizer
from engines.demo.training import Report, Run, averaged


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


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"animatediff": train_animatediff, "controlnext": train_controlnext}[sys.argv[1]](
        Path(sys.argv[2]), lambda line: print(time.strftime("%H:%M:%S"), line, flush=True)
    )
