"""Our pipeline against diffusers' `AnimateDiffSparseControlNetPipeline` in one process: same weights, threads and input.

Both go from prompt and keyframe files to 16 uint8 RGB frames. They take turns, so that a busy machine slows both; the ratio
is the median of the rounds' ratios. Every round has another prompt, so that ours finds no cached SparseCtrl results. The rows
"another seed" repeat the round's prompt with another seed, and use the cached results. This applies to scribbles only, as an
rgb keyframe's latents are drawn with the seed.
"""

import argparse
import io
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.table import Table

from engines.animatediff.config import AnimateDiffConfig
from engines.animatediff.demo_weights import DemoSize, write_demo_weights
from engines.animatediff.spec import AnimateDiffSpec, ControlType
from engines.pipeline import Pipeline
from tests.engines.animatediff.media import keyframes
from tests.engines.animatediff.reference import diffusers_pipeline
from tests.load.report import Report, ms, table

MODEL = "animatediff-sparsectrl-lcm"
TARGET = 0.9
STEPS = 4
ROUNDS = 10
KEYFRAMES = keyframes(0, 8, 15)
WIDE = DemoSize(channels=(64, 128), layers=2, latent=16, vae_channels=(16, 32, 64, 64))
"""Four times the pixels and twice the channels, so that the cost of launching operations matters less than in the tiny one."""

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Round:
    """One prompt through both, in seconds. preprocess, denoise and decode are parts of `ours`; seed_*: the second seed."""

    theirs: float
    ours: float
    preprocess: float
    denoise: float
    decode: float
    seed: float
    seed_denoise: float
    difference: int


def theirs(pipe: Any, spec: AnimateDiffSpec) -> Pixels:
    """diffusers' frames."""
    images = [Image.open(io.BytesIO(keyframe.image)) for keyframe in spec.keyframes]
    generator = torch.Generator().manual_seed(spec.seed)
    if spec.controlnet_type == "rgb":  # draws the posterior from the global generator, where we draw from the request's
        size = pipe.unet.config.sample_size
        torch.manual_seed(spec.seed)
        torch.randn((len(images), 4, size, size), generator=generator)
    frames = pipe(
        prompt=spec.prompt,
        negative_prompt=spec.negative_prompt,
        conditioning_frames=images,
        controlnet_frame_indices=[keyframe.index for keyframe in spec.keyframes],
        num_frames=16,
        num_inference_steps=spec.num_inference_steps,
        guidance_scale=spec.guidance_scale,
        generator=generator,
        output_type="np",
    ).frames[0]
    pixels: Pixels = (frames * 255).round().astype(np.uint8)
    return pixels


def ours(pipeline: Pipeline, spec: AnimateDiffSpec) -> tuple[Pixels, tuple[float, float, float]]:
    """Our frames, and the seconds that preprocess, denoise and decode took."""
    began = time.perf_counter()
    conditioning = pipeline.preprocess.encode(spec)
    preprocessed = time.perf_counter()
    latents = pipeline.denoise.sample(conditioning)
    denoised = time.perf_counter()
    pixels = np.concatenate(list(pipeline.decode.frames(latents)))
    return pixels, (preprocessed - began, denoised - preprocessed, time.perf_counter() - denoised)


def play_round(pipeline: Pipeline, pipe: Any, spec: AnimateDiffSpec) -> Round:
    started = time.perf_counter()
    expected = theirs(pipe, spec)
    their_time = time.perf_counter() - started
    pixels, parts = ours(pipeline, spec)
    _, seed_parts = ours(pipeline, replace(spec, seed=spec.seed + 1_000_000))
    difference = int(np.abs(pixels.astype(int) - expected).max())
    return Round(their_time, sum(parts), *parts, sum(seed_parts), seed_parts[1], difference)


def measure(folder: Path, size: DemoSize, rounds: int) -> list[tuple[ControlType, float, list[Round]]]:
    """Every case's rounds, on checkpoints of `size`."""
    config = AnimateDiffConfig(weights=write_demo_weights(folder, size))
    pipeline = Pipeline(MODEL, config)
    cases: list[tuple[ControlType, float, list[Round]]] = []
    kind: ControlType
    for kind in ("scribble", "rgb"):
        pipe = diffusers_pipeline(config, kind, "v_prediction")
        pipe.vae.to(memory_format=torch.contiguous_format)  # as diffusers loads it; ours is channels-last
        for guidance in (1.0, 2.0):
            specs = [AnimateDiffSpec(i, STEPS, guidance, f"a ball, take {i}", "blur", kind, KEYFRAMES) for i in range(rounds + 1)]
            _, *measured = [play_round(pipeline, pipe, spec) for spec in specs]  # the first warms up
            cases.append((kind, guidance, measured))
    return cases


def ratios(cases: list[tuple[ControlType, float, list[Round]]], title: str) -> Table:
    """ours is preprocess, denoise and decode together; max difference: of any pixel, in levels of 255."""
    columns = ("case", "diffusers ms", "ours ms", "ratio", "range", "preprocess", "denoise", "decode", "max difference")
    shown = table(title, *columns)
    for kind, guidance, rounds in cases:
        each = [r.ours / r.theirs for r in rounds]
        shown.add_row(
            f"{kind}, guidance {guidance:g}",
            *(ms(median(rounds, field)) for field in ("theirs", "ours")),
            f"{statistics.median(each):.2f}",
            f"{min(each):.2f}..{max(each):.2f}",
            *(ms(median(rounds, field)) for field in ("preprocess", "denoise", "decode")),
            str(max(r.difference for r in rounds)),
        )
        if kind == "scribble":
            seed = statistics.median(r.seed / r.theirs for r in rounds)
            denoise = ms(median(rounds, "seed_denoise"))
            shown.add_row("  same, another seed", "", ms(median(rounds, "seed")), f"{seed:.2f}", "", "", denoise, "", "")
    return shown


def median(rounds: list[Round], field: str) -> float:
    return statistics.median(getattr(r, field) for r in rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of the tiny size; fewer than usual are not saved")
    wanted = parser.parse_args().rounds
    report = Report("pipeline", f"Our pipeline against diffusers', {STEPS} steps, 16 frames, three keyframes", __doc__)
    report.add(f"Target: a ratio of at most {TARGET}. Times in ms are medians.")
    with TemporaryDirectory(prefix="reelray-") as folder:
        for name, size, rounds in (("tiny", DemoSize(layers=2), wanted), ("wide", WIDE, -(-wanted // 4))):
            pixels = 8 * size.latent
            title = f"{name}: {pixels}x{pixels} pixels, channels {size.channels}, {rounds} rounds"
            with report.console.status(title):
                cases = measure(Path(folder) / name, size, rounds)
            report.add(ratios(cases, title))
    if wanted >= ROUNDS:
        report.save()


if __name__ == "__main__":
    main()
