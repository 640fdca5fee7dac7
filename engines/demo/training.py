"""The training loop of every part of the demo models: seeded, and resumable to the step.

A step is a function of its number and of the state before it: it draws everything from a generator seeded with that number. The
state (weights, their average, the optimizer) is written every few minutes, whole or not at all, so a kill loses little and the
resumed run makes the same steps as an unbroken one would have made.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engines.demo.sheet import write_curve

Report = Callable[[str], None]


class Task(Protocol):
    """What is trained. schedule: number of steps and the like."""

    name: str
    schedule: "Schedule"

    @property
    def net(self) -> nn.Module:
        """All its parameters are trained."""
        ...

    def losses(self, step: int, rng: torch.Generator) -> Mapping[str, Tensor]:
        """Scalars of one step. Their sum under "loss" is minimised, the others are only recorded."""
        ...

    def sheet(self, path: Path) -> str:
        """Draws samples of the net as it is into a PNG. Returns a line about how good they are, or nothing."""
        ...


@dataclass(frozen=True)
class Schedule:
    """steps: in all. rate: AdamW's, after `warmup` steps; from `hold` (a fraction of the steps) on it falls to zero on a cosine.

    average: decay of the weights' moving average, which is what is sampled and shipped.
    """

    steps: int
    rate: float
    warmup: int = 100
    hold: float = 0.5
    average: float = 0.999
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0

    def rate_at(self, step: int) -> float:
        """The learning rate of a step."""
        rate = self.rate * min(1.0, (step + 1) / self.warmup)
        late = (step / self.steps - self.hold) / (1 - self.hold)
        return rate if late <= 0 else rate * 0.5 * (1 + math.cos(math.pi * min(late, 1.0)))


@dataclass(frozen=True)
class Pace:
    """How often, in seconds or steps."""

    save_s: float = 120
    report_steps: int = 25
    sheet_steps: int = 500


class Run:
    """One task's training in `folder`: `state.pt`, `curve.jsonl` and a sheet every few hundred steps."""

    def __init__(
        self,
        task: Task,
        folder: Path,
        seed: int = 0,
        pace: Pace = Pace(),
        device: str = "cpu",
        start: Callable[[], None] | None = None,
    ):
        """start: gives the net its first weights, on the CPU; not called for a run that has begun."""
        self.task, self.seed, self.pace = task, seed, pace
        self.folder = folder / task.name
        self.folder.mkdir(parents=True, exist_ok=True)
        if start is not None and not self._state.exists():
            start()
        task.net.to(device)
        self.optimizer = torch.optim.AdamW(
            task.net.parameters(), lr=task.schedule.rate, betas=task.schedule.betas, weight_decay=0.01
        )
        self.average = {key: value.detach().clone() for key, value in task.net.state_dict().items()}
        self.step = 0
        if self._state.exists():
            self._load()

    @property
    def done(self) -> bool:
        """Whether all steps were made."""
        return self.step >= self.task.schedule.steps

    @property
    def curve(self) -> Path:
        """A line of JSON a report: the step, and each value's mean since the last one."""
        return self.folder / "curve.jsonl"

    @property
    def _state(self) -> Path:
        return self.folder / "state.pt"

    def train(self, report: Report, until: int | None = None) -> None:
        """Make the steps that are left, or those before `until`."""
        last = min(self.task.schedule.steps, until or self.task.schedule.steps)
        saved = reported = time.monotonic()
        reported_at = self.step
        seen: dict[str, list[float]] = {}
        while self.step < last:
            for key, value in self._advance().items():
                seen.setdefault(key, []).append(value)
            now = time.monotonic()
            if self.step % self.pace.report_steps == 0:
                made = self.step - reported_at
                self._report(report, {key: fmean(values) for key, values in seen.items()}, (now - reported) / made)
                seen, reported, reported_at = {}, now, self.step
            if self.step % self.pace.sheet_steps == 0 and self.step < last:
                self.sheet(report)
            if now - saved > self.pace.save_s:
                self.save()
                saved = now
        self.save()

    def sheet(self, report: Report) -> None:
        """Draw samples of the averaged weights."""
        own = {key: value.clone() for key, value in self.task.net.state_dict().items()}
        self.task.net.load_state_dict(self.average)
        self.task.net.eval()
        with torch.no_grad():
            line = self.task.sheet(self.folder / f"sheet-{self.step:06d}.png")
        self.task.net.load_state_dict(own)
        self.task.net.train()
        report(f"{self.task.name}: step {self.step}: {line}")
        if self.curve.exists():
            write_curve(self.folder / "curve.png", self.curve.read_text())

    def save(self) -> None:
        """Write the state, whole or not at all."""
        draft = self._state.with_suffix(".draft")
        net, optimizer = self.task.net.state_dict(), self.optimizer.state_dict()
        torch.save({"step": self.step, "net": net, "average": self.average, "optimizer": optimizer}, draft)
        os.replace(draft, self._state)

    def _load(self) -> None:
        state: dict[str, Any] = torch.load(self._state, map_location=device_of(self.task.net), weights_only=True)
        self.task.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average, self.step = state["average"], state["step"]

    def _advance(self) -> dict[str, float]:
        task, schedule = self.task, self.task.schedule
        rng = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = schedule.rate_at(self.step)
        losses = task.losses(self.step, rng)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(task.net.parameters(), schedule.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(schedule.average, (1 + self.step) / (10 + self.step))
        for key, value in task.net.state_dict().items():
            self.average[key].lerp_(value, 1 - decay) if value.is_floating_point() else self.average[key].copy_(value)
        self.step += 1
        return {key: value.item() for key, value in losses.items()}

    def _report(self, report: Report, means: Mapping[str, float], step_s: float) -> None:
        left = (self.task.schedule.steps - self.step) * step_s / 60
        values = " ".join(f"{key} {value:.4f}" for key, value in means.items())
        report(
            f"{self.task.name}: step {self.step}/{self.task.schedule.steps}, {values}, {step_s:.2f} s a step, {left:.0f} min left"
        )
        with self.curve.open("a") as file:
            file.write(json.dumps({"step": self.step, **means}) + "\n")


def averaged(task: Task, folder: Path) -> Any:
    """The task's net with the averaged weights of its run in `folder`, frozen, where it is."""
    state = torch.load(folder / task.name / "state.pt", map_location="cpu", weights_only=True)
    task.net.load_state_dict(state["average"])
    return task.net.requires_grad_(False).eval()


def device_of(net: nn.Module) -> torch.device:
    """Where its parameters are. Data are drawn on the CPU everywhere, so that a step sees the same ones."""
    return next(net.parameters()).device
