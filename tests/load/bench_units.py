"""What it gives to spread a job's units over replicas, and what it costs on one.

A job of ControlNeXt with the demo weights, by one denoise replica and by two, one thread each, in turn, so that the machine's
other work falls on both. Then jobs whose units of work only sleep, as long as real ones of a GPU take: by one replica against the
same job in this process, by eight against the ideal (the longest that a replica must work if the units of each step are dealt out
evenly), and a short job beside a long one against the short one alone, and how
soon a cancel frees all replicas.

All calls go through Ray Serve, with the real sampler and scheduling. Linux gives each session of processes one share of the
machine, however many of them compute (`sched_autogroup`): beside other work, two replicas would together get no more than one. So
this session's share is raised, where that is allowed.
"""

import asyncio
import math
import os
import statistics
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from engines.config import ModelConfig
from engines.controlnext.config import ControlNeXtConfig, ControlNeXtWeights
from engines.controlnext.demo_weights import write_demo_weights
from engines.registry import build_stage
from engines.sampling import seeded_generator
from engines.units import LocalRunner
from tests.e2e.service import ENVIRONMENT
from tests.engines.controlnext.conftest import conditioning
from tests.load.report import Report, ms, table
from tests.load.sleeping.denoise import Denoise, SleepingConditioning
from tests.load.sleeping.sampler import Sampler
from tests.load.unit_service import SLEEPING, UnitService, serving_units, units

ROUNDS = 3
AHEAD = "-12"
"""The niceness of this session beside others."""
LATENTS = (24, 4, 128, 72)
"""Of a window of 24 frames at 576x1024."""
SHARE_2, COST_1, IDEAL_8, BESIDE = 0.6, 0.02, 0.9, 2.0


def sleeping(units_: int, steps: int, unit_s: float) -> SleepingConditioning:
    return SleepingConditioning(1, steps, 1.0, seeded_generator(1).get_state(), (), units_, unit_s, LATENTS)


def alone_s(asked: SleepingConditioning) -> float:
    """The same job in this process."""
    began = time.perf_counter()
    Sampler().sample(asked, LocalRunner(Denoise(ModelConfig()).begin(asked)))
    return time.perf_counter() - began


async def real(report: Report, one: UnitService, two: UnitService, expected: torch.Tensor, asked: Any) -> None:
    taken: dict[int, list[float]] = {1: [], 2: []}
    for take in range(ROUNDS + 1):
        for replicas, service in ((1, one), (2, two)):
            latents, _, seconds = await service.denoise(asked)
            assert torch.equal(latents.values, expected), "the bits of one process"
            if take:
                taken[replicas].append(seconds)
    shown = table("A job of ControlNeXt, demo weights", "replicas", "best s", "median s")
    for replicas, times in taken.items():
        shown.add_row(str(replicas), f"{min(times):.2f}", f"{statistics.median(times):.2f}")
    report.add(shown)
    ratios = [b / a for a, b in zip(taken[1], taken[2], strict=True)]
    report.add(
        f"Two replicas take {min(taken[2]) / min(taken[1]):.2f} of one's time (best of {ROUNDS}; round by round "
        f"{', '.join(f'{ratio:.2f}' for ratio in ratios)}); target: at most {SHARE_2}. The latents are those of one process."
    )


async def cost_of_one(report: Report, one: UnitService) -> None:
    shown = table("One replica against this process", "unit ms", "units", "this process s", "service s", "cost")
    for unit_s, steps in ((0.1, 25), (0.2, 5)):
        asked = sleeping(26, steps, unit_s)
        await one.denoise(sleeping(2, 1, 0.01))
        inside, (_, _, outside) = alone_s(asked), await one.denoise(asked)
        shown.add_row(ms(unit_s), str(26 * steps), f"{inside:.2f}", f"{outside:.2f}", f"{outside / inside - 1:.1%}")
    report.add(shown)
    report.add(f"Target: at most {COST_1:.0%} with units of 100 ms and more. The time includes sending the conditioning.")


async def many(report: Report, service: UnitService, replicas: int) -> None:
    asked = sleeping(26, 10, 0.2)
    await service.denoise(sleeping(26, 1, 0.01))
    _, _, seconds = await service.denoise(asked)
    ideal_s = math.ceil(26 / replicas) * 0.2 * 10
    short, long = sleeping(2, 10, 0.2), sleeping(26, 30, 0.2)
    _, _, solo_s = await service.denoise(short)
    going = asyncio.create_task(service.denoise(long))
    await asyncio.sleep(2)
    _, _, beside_s = await service.denoise(short)
    await going
    report.add(
        f"{replicas} replicas, units of 200 ms, 26 a step: {ideal_s / seconds:.1%} of the ideal; target: at least {IDEAL_8:.0%}. "
        f"A job of two units a step takes {solo_s:.2f} s alone and {beside_s:.2f} s beside one of 26, {beside_s / solo_s:.2f}"
        f" times as long; target: at most {BESIDE}."
    )


async def cancels(report: Report, service: UnitService, replicas: int) -> None:
    one_each = sleeping(replicas, 1, 0.2)
    alone, after = [], []
    for _ in range(ROUNDS):
        alone.append((await service.denoise(one_each))[2])
        await service.cancelled(sleeping(26, 30, 0.2), after_s=1.0)
        after.append((await service.denoise(one_each))[2])
    free_s = statistics.median(after) - statistics.median(alone)
    report.add(
        f"A job of one unit a replica takes {statistics.median(alone):.2f} s, and {statistics.median(after):.2f} s after the"
        f" cancel of a long one (medians of {ROUNDS}): all replicas were free {free_s:.2f} s after it; target: a unit's 0.2 s."
    )


async def measure(report: Report, weights: ControlNeXtWeights) -> None:
    config = ControlNeXtConfig(weights=weights, threads=1)
    asked = conditioning(40, num_inference_steps=3, batch_frames=8, overlap=2)
    poses = torch.randint(0, 256, (40, 3, 256, 192), dtype=torch.uint8)
    asked = replace(asked, poses=poses, image_latent=torch.randn(4, 32, 24))
    expected = build_stage("controlnext", "denoise", config).sample(asked).values
    with units("controlnext", config, 1) as one, units("controlnext", config, 2) as two:
        await real(report, one, two, expected, asked)
    with units("controlnext", config, 3) as three:
        latents, done, _ = await three.denoise(asked)
        assert torch.equal(latents.values, expected)
        report.add(f"Three replicas ({done.receipt['replicas']} of them worked) give the same latents.")
    with units(SLEEPING, ModelConfig(), 1) as one:
        await cost_of_one(report, one)
    for replicas in (2, 8):
        with units(SLEEPING, ModelConfig(), replicas) as service:
            await many(report, service, replicas)
            if replicas > 2:
                await cancels(report, service, replicas)


def get_ahead() -> None:
    with suppress(OSError):  # not our machine, or no Linux
        os.setsid()
    with suppress(OSError):
        Path("/proc/self/autogroup").write_text(AHEAD)


def main() -> int:
    get_ahead()
    os.environ.update(ENVIRONMENT)
    report = Report("units", "Units over replicas", __doc__, "`make bench-units`")
    with TemporaryDirectory(prefix="reelray-") as folder, serving_units(cpus=16):
        asyncio.run(measure(report, write_demo_weights(Path(folder) / "controlnext")))
    report.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
