"""ControlNeXt SVD on the CPU: its UNet against diffusers', its loop against the algorithm without savings, and its memory.

A UNet row is one window of F frames. It compares a call of diffusers' `UNetSpatioTemporalConditionModel` with a call of ours,
for one guidance half and for both. diffusers runs both halves as one batch of two; we make two calls, since each may be on
another GPU. So the fixed cost of a call counts twice on our side, which shows with the tiny net. The loop row is a whole job,
including the control net, against the tests' reference sampler, written from `video-models.md` 2B without its section 5. Both
sides take turns, so that a busy machine slows both; a ratio is the median of the rounds' ratios. Memory is the peak of a
separate process, the median of three.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.table import Table

from engines.controlnext.checkpoint import load_diffusers_unet, load_unet
from engines.controlnext.config import ControlNeXtConfig, ControlNeXtWeights
from engines.controlnext.demo_weights import TINY, DemoSize, write_demo_weights
from engines.controlnext.denoise import Denoise
from engines.controlnext.nets.control_net import ControlNetSize
from tests.engines.controlnext import reference
from tests.engines.controlnext.conftest import conditioning, first_noise, reference_nets
from tests.load.report import Report, ms, table

TARGET = 0.85
ROUNDS = 15
TIME, IDS = 0.7, (6.0, 127.0, 0.02)
SIZES = (
    ("tiny", TINY, (8, 8), 8, ROUNDS),
    ("wider", DemoSize((64, 128), (4, 8), ControlNetSize(out=64)), (16, 16), 14, 10),
    ("widest", DemoSize((128, 256), (2, 4), ControlNetSize(out=128)), (32, 24), 14, 5),
)
"""Name, weights, latents' height and width, frames of a window, rounds."""


def side_by_side(theirs: Callable[[], object], ours: Callable[[], object], rounds: int) -> list[tuple[float, float]]:
    """(theirs, ours) in seconds, for every round but the first, which warms up."""
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        theirs()
        middle = time.perf_counter()
        ours()
        seconds.append((middle - start, time.perf_counter() - middle))
    return seconds[1:]


def add_row(shown: Table, name: str, seconds: list[tuple[float, float]], difference: float) -> None:
    ratios = [mine / other for other, mine in seconds]
    theirs, ours = (ms(statistics.median(column)) for column in zip(*seconds, strict=True))
    spread = f"{min(ratios):.2f}..{max(ratios):.2f}"
    shown.add_row(name, theirs, ours, f"{statistics.median(ratios):.2f}", spread, f"{difference:.1e}")


@torch.inference_mode()
def unet_row(shown: Table, folder: Path, name: str, size: DemoSize, latent: tuple[int, int], frames: int, rounds: int) -> None:
    config = ControlNeXtConfig(weights=write_demo_weights(folder, size))
    stock, unet = load_diffusers_unet(config), load_unet(config)
    x, image, embedding = torch.randn(frames, 4, *latent), torch.randn(4, *latent), torch.randn(1, 32)
    images = torch.stack([torch.zeros_like(image), image])[:, None].expand(-1, frames, -1, -1, -1)
    batch = torch.cat([x[None].expand(2, -1, -1, -1, -1), images], dim=2)  # (2, F, 8, h, w)
    context, ids = torch.stack([torch.zeros_like(embedding), embedding]), torch.tensor([IDS, IDS])
    halves = [unet.guidance_half(torch.zeros_like(image), torch.zeros_like(embedding)), unet.guidance_half(image, embedding)]
    (biases,) = unet.time_biases([TIME], IDS)

    def theirs(which: slice) -> torch.Tensor:
        return stock(batch[which], torch.tensor(TIME), context[which], ids[which], return_dict=False)[0]

    def ours(which: slice) -> torch.Tensor:
        return torch.stack([unet(x, half, biases) for half in halves[which]])

    title = f"{name}: channels {size.channels}, {frames} frames, {8 * latent[1]}x{8 * latent[0]}"
    for words, which in ((f"{title}, a call", slice(1, 2)), ("  both halves", slice(2))):
        difference = (theirs(which) - ours(which)).abs().max().item()
        add_row(shown, words, side_by_side(partial(theirs, which), partial(ours, which), rounds), difference)


def loop_row(shown: Table, weights: ControlNeXtWeights, guidance: float, rounds: int) -> None:
    """Adds a row for 16 frames in windows of 6 with an overlap of 2, three steps."""
    stage, nets = Denoise(ControlNeXtConfig(weights=weights)), reference_nets(weights)
    asked = conditioning(16, guidance_scale=guidance)

    def theirs() -> torch.Tensor:
        given = (asked.poses, asked.image_latent, asked.image_embedding, first_noise(16))
        return reference.sample(*nets, *given, steps=3, guidance=guidance, batch_frames=6, overlap=2, ids=asked.added_ids)

    difference = (theirs().transpose(1, 2) - stage.sample(asked).values).abs().max().item()
    add_row(shown, f"guidance {guidance:g}", side_by_side(theirs, lambda: stage.sample(asked), rounds), difference)


def memory_row(shown: Table, folder: Path) -> None:
    peaks = []
    for frames in (240, 2000):
        command = [sys.executable, "-m", "tests.engines.controlnext.peak_memory", str(folder), "8", str(frames)]
        runs = [int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(3)]
        peaks.append(int(statistics.median(runs)))
    short, long = peaks
    shown.add_row("decode, 64x64 pixels, chunks of 2", *(f"{peak / 1e6:.0f}" for peak in peaks), f"{long / short:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="at most; fewer than usual are not saved")
    wanted = parser.parse_args().rounds
    report = Report("controlnext", "ControlNeXt SVD against diffusers' UNet and against its algorithm without savings", __doc__)
    report.add(f"Target of a UNet call: a ratio of at most {TARGET}. Times in ms are medians.")
    with TemporaryDirectory(prefix="reelray-") as name:
        folder = Path(name)
        columns = ("diffusers ms", "ours ms", "ratio", "range", "max difference")
        shown = table("one window through the UNet", "case", *columns)
        for label, size, latent, frames, rounds in SIZES:
            with report.console.status(label):
                unet_row(shown, folder / label, label, size, latent, frames, min(rounds, wanted))
        report.add(shown)
        shown = table("a whole denoising loop, tiny", "case", "direct ms", *columns[1:])
        for guidance in (1.0, 3.0):
            loop_row(shown, write_demo_weights(folder / "tiny"), guidance, min(5, wanted))
        report.add(shown)
        shown = table("peak memory", "case", "240 frames, MB", "2,000 frames, MB", "ratio")
        memory_row(shown, folder / "tiny")
        report.add(shown)
    if wanted >= ROUNDS:
        report.save()


if __name__ == "__main__":
    main()
