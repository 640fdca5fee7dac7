"""Trains the ControlNeXt demo's UNet and control net: the puppet of a reference image in the stances of pose pictures.

The reference and the pose determine each frame, so the first step, from pure noise, can already draw it: a third of the noise
levels are high. `demo-weights.md`, section 5.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engines.controlnext.demo_pose import Puppet
from engines.demo.animatediff.judge import as_frames
from engines.demo.controlnext.autoencoder import CHANNELS
from engines.demo.controlnext.bank import FRAMES, PuppetBank
from engines.demo.controlnext.judge import PuppetJudge
from engines.demo.controlnext.nets import LATENT_SCALING, PuppetNets
from engines.demo.controlnext.puppets import build_of, pictures, pose_pictures, random_moves, random_puppet, stances
from engines.demo.sheet import write_sheet
from engines.demo.training import Schedule, device_of
from engines.sampling import euler_step, karras_sigmas

SCHEDULE = Schedule(6000, 1.2e-3, hold=0.4, average=0.998)
SIGMA_RANGE = (0.002, 700.0)
_MIDDLE, _SPREAD = 0.7, 1.6  # of ln sigma, as SVD was trained
_HIGH_SHARE, _HIGH = 0.35, (30.0, 700.0)
_DROP_SHARE = 0.1  # of clips without image and poses, for guidance
_LONG = 0.6  # from this fraction of the steps on, whole windows


def draw_sigmas(count: int, rng: torch.Generator) -> Tensor:
    """(B,): log-normal, or high ones evenly in their logarithm."""
    usual = (_MIDDLE + _SPREAD * torch.randn(count, generator=rng)).exp()
    low, high = torch.tensor(_HIGH).log()
    great = (low + (high - low) * torch.rand(count, generator=rng)).exp()
    return torch.where(torch.rand(count, generator=rng) < _HIGH_SHARE, great, usual).clamp(*SIGMA_RANGE)


def ids(count: int, rng: torch.Generator | None = None) -> Tensor:
    """(B, 3): fps id, motion bucket, noise strength: the served defaults, or any, for they shall not matter."""
    usual = torch.tensor([[6.0, 127.0, 0.02]]).expand(count, -1)
    if rng is None:
        return usual
    anything = torch.tensor([30.0, 255.0, 0.02]) * torch.cat([torch.rand(count, 2, generator=rng), torch.ones(count, 1)], dim=1)
    return torch.where(torch.rand(count, 1, generator=rng) < 0.5, usual, anything)


@dataclass
class PuppetTask:
    """bank: with latents of unit variance. encode, decode: images in [0, 1] to latents of unit variance and embeddings; back."""

    bank: PuppetBank
    encode: Callable[[Tensor], tuple[Tensor, Tensor]]
    decode: Callable[[Tensor], Tensor]
    name: str = "controlnext-clips"
    schedule: Schedule = SCHEDULE
    clips: int = 4
    net: PuppetNets = field(default_factory=PuppetNets)

    def losses(self, step: int, rng: torch.Generator) -> Mapping[str, Tensor]:
        """See `Task`. The first frame of a window is the reference, as it is served; then neighbouring frames."""
        dice = random.Random(int(torch.randint(2**31, (), generator=rng)))
        clips, length = (self.clips, FRAMES // 2) if step < _LONG * self.schedule.steps else (self.clips // 2, FRAMES)
        chosen = [dice.randrange(len(self.bank.latents)) for _ in range(clips)]
        references = [dice.randrange(FRAMES) for _ in chosen]
        starts = [dice.randrange(FRAMES - length + 2) for _ in chosen]
        rows = torch.tensor(chosen)[:, None]
        columns = torch.tensor([[r, *range(s, s + length - 1)] for r, s in zip(references, starts, strict=True)])
        clean = self.bank.latents[rows, columns]  # (B, F, 16, 16, 16)
        joints = self.bank.joints[rows, columns].flatten(0, 1).double().numpy()
        poses = pose_pictures(list(joints), dice).unflatten(0, (clips, -1))
        sigmas = draw_sigmas(clips, rng)
        conditional = (torch.rand(clips, generator=rng) >= _DROP_SHARE).float()
        noise = torch.randn(clean.shape, generator=rng)
        noisy, target = noised(clean, noise, sigmas)
        embedding = self.bank.embeddings[rows[:, 0], columns[:, 0]]
        guess = self._predict(noisy, sigmas, unscaled(clean[:, 0]), embedding, poses, ids(clips, rng), conditional)
        each = (guess - target.to(guess)).square().flatten(1).mean(dim=1).cpu()
        high = sigmas > _HIGH[0]
        told = conditional > 0
        parts = {"high": high & told, "low": ~high & told, "free": ~told}
        return {"loss": each.mean(), **{key: each[part].mean().detach() for key, part in parts.items() if part.any()}}

    def sheet(self, path: Path) -> str:
        """Puppets never seen: the true clip, and below it what the model draws in four steps; the reference comes first."""
        rows, verdicts = [], []
        judge = PuppetJudge()
        for seed in range(3):
            puppet, joints = unseen(seed)
            truth = pictures(puppet, joints)
            drawn = self.sample(truth[0], pose_pictures(joints))
            rows += [truth, drawn]
            verdicts.append(judge(as_frames(drawn), np.stack(joints), puppet))
        write_sheet(path, rows)
        error, found, colours = (
            sum(getattr(verdict, name) for verdict in verdicts) / len(verdicts) for name in ("error", "found", "colours")
        )
        gap = sum(float((a - b).abs().mean()) for a, b in zip(rows[::2], rows[1::2], strict=True)) / len(verdicts)
        return f"joints {100 * error:.1f} % off, {100 * found:.0f} % found, colours {100 * colours:.0f} %, pixels {gap:.3f} off"

    def sample(self, reference: Tensor, poses: Tensor, steps: int = 4) -> Tensor:
        """(F, 3, 256, 256) in [0, 1]: one window, without guidance. reference: (3, 256, 256). poses: (F, 3, 256, 256)."""
        image, embedding = self.encode(reference[None])
        sigmas = karras_sigmas(steps, *SIGMA_RANGE)
        shape = (len(poses), CHANNELS, *image.shape[2:])
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * (sigmas[0] ** 2 + 1) ** 0.5
        for sigma, after in pairwise(sigmas):
            scaled = x[None] / (sigma**2 + 1) ** 0.5
            told = torch.ones(1)
            v = self._predict(scaled, torch.tensor([sigma]), unscaled(image), embedding, poses[None], ids(1), told)[0]
            x = euler_step(x, v.cpu(), sigma, after)
        return self.decode(x)

    def _predict(self, *inputs: Tensor) -> Tensor:
        """v, on the net's device."""
        device = device_of(self.net)
        return self.net(*(values.to(device) for values in inputs))


def noised(clean: Tensor, noise: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """The model's input and the v it must give. clean, noise: (B, ...). sigmas: (B,). arXiv 2202.00512, appendix D."""
    sigma = sigmas.reshape(-1, *(1,) * (clean.ndim - 1))
    root = (sigma**2 + 1).sqrt()
    return (clean + sigma * noise) / root, (noise - sigma * clean) / root


def unscaled(latents: Tensor) -> Tensor:
    """The reference's latents as the UNet gets them."""
    return latents / LATENT_SCALING


def unseen(seed: int) -> tuple[Puppet, list[np.ndarray]]:
    """A puppet outside the bank, and the joints of the reference and of seven driving frames."""
    dice = random.Random(10_000_000 + seed)
    puppet, moves = random_puppet(dice), random_moves(dice)
    driver = build_of(puppet, dice)
    return puppet, [*stances(puppet, random_moves(dice), (0,)), *stances(driver, moves, range(1, FRAMES))]
