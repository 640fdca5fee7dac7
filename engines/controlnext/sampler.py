"""Noise to latents on the host: Euler steps of a whole video, each the average of overlapping windows.

A unit of work is one window in one guidance half at one step; the units of a step do not depend on each other. Predictions are
averaged and the sampler steps once on the whole video, which is the same as averaging stepped windows (5c). Frames are summed in
the order of their windows, so the result does not depend on where or in which order units ran. `video-models.md` 2B.6-2B.9.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from engines.checkpoints.weights import torch_dtype
from engines.controlnext.config import ControlNeXtConfig, weights_of
from engines.controlnext.noise import NoiseRange, load_noise_range
from engines.controlnext.spec import ControlNeXtConditioning, ControlNeXtLatents
from engines.controlnext.windows import Window, times_counted, windows
from engines.diffusion.step_loop import run_steps
from engines.sampling import euler_step, guide, restored_generator
from engines.spec import Checkpoint, OnProgress, OnStep, Progress
from engines.units import Unit, UnitRunner


@dataclass(frozen=True, kw_only=True)
class WindowUnit(Unit):
    """One window in one guidance half at one step.

    latents: (F, 4, h, w), the window's, scaled for the model and in its dtype. conditional: the half with image and poses.
    """

    step: int
    window: Window
    conditional: bool
    latents: Tensor


class Sampler:
    """See `engines.units.Sampler`. noise: used by benchmarks instead of the checkpoint's. Raises `WeightsError`."""

    def __init__(self, config: ControlNeXtConfig, noise: NoiseRange | None = None):
        self.noise = noise or load_noise_range(weights_of(config))
        self.dtype = torch_dtype(config.dtype)
        self.state_dtype = torch.promote_types(self.dtype, torch.float32)  # of the latents between steps

    @torch.inference_mode()
    def sample(
        self,
        conditioning: ControlNeXtConditioning,
        runner: UnitRunner,
        *,
        resume: Checkpoint | None = None,
        on_step: OnStep | None = None,
        on_progress: OnProgress | None = None,
    ) -> ControlNeXtLatents:
        """The video's latents, (1, 4, N, h, w).

        on_step, on_progress: see `run_steps`; `resume` takes a checkpoint of `on_step`.
        on_progress: also called within a step, after each window but the last.
        Raises `Cancelled` if the runner does, `GenerationFailed` on non-finite latents.
        """
        run = _Run(self, conditioning, runner, on_progress)
        start = resume or self._start(conditioning)
        if (start.steps, start.latents.shape[2]) != (conditioning.num_inference_steps, len(conditioning.poses)):
            raise ValueError("the checkpoint belongs to another request")
        # contiguous, as between steps: a checkpoint from a file is not, and other strides could mean other kernels and other bits
        x = start.latents[0].transpose(0, 1).contiguous()  # (N, 4, h, w)
        x = run_steps(run.step, start, x, _as_clip, run.ran, on_step, on_progress)
        made = (_as_clip(x), conditioning.seed, conditioning.decode_chunk_size, conditioning.fps)
        return ControlNeXtLatents(*made, engine="+".join(sorted(run.ran)))

    def _start(self, conditioning: ControlNeXtConditioning) -> Checkpoint:
        """Noise at the largest sigma, drawn after the reference image's noise."""
        generator = restored_generator(conditioning.rng_state)
        shape = (1, len(conditioning.poses), *conditioning.image_latent.shape)
        noise = torch.randn(shape, generator=generator).to(self.state_dtype)
        latents = noise.transpose(1, 2) * (self.noise.sigma_max**2 + 1) ** 0.5
        return Checkpoint(0, conditioning.num_inference_steps, latents, generator.get_state())


class _Run:
    """One request's steps. ran: the names of the engines that ran them."""

    def __init__(
        self, sampler: Sampler, conditioning: ControlNeXtConditioning, runner: UnitRunner, on_progress: OnProgress | None
    ):
        num_frames = len(conditioning.poses)
        self.dtype, self.state_dtype = sampler.dtype, sampler.state_dtype
        self.runner, self.on_progress = runner, on_progress
        self.guidance_scale = conditioning.guidance_scale
        self.halves = (True,) if conditioning.guidance_scale == 1 else (True, False)  # 5h
        self.controlled = conditioning.controlnext_cond_scale != 0
        self.sigmas = sampler.noise.sigmas(conditioning.num_inference_steps)
        self.windows = windows(num_frames, conditioning.batch_frames, conditioning.overlap)
        self.counts = torch.tensor(times_counted(num_frames, self.windows))[:, None, None, None]  # (N, 1, 1, 1)
        self.ran: set[str] = set()

    def step(self, x: Tensor, i: int, _: torch.Generator) -> Tensor:
        """See `RunStep`. x: (N, 4, h, w). An Euler step draws no noise."""
        return euler_step(x, self._predict(x, i), self.sigmas[i], self.sigmas[i + 1])

    def _predict(self, x: Tensor, i: int) -> Tensor:
        """The guided velocity at step i, averaged over the windows. x: (N, 4, h, w)."""
        scaled = (x / (self.sigmas[i] ** 2 + 1) ** 0.5).to(self.dtype)
        total = torch.zeros_like(x)
        halves: dict[int, Tensor] = {}  # place of a unit -> its output, until its window is summed
        summed, left = 0, [len(self.halves)] * len(self.windows)
        for place, output in self.runner.run(list(self._units(scaled, i)), _nothing_told):
            halves[place] = output.values.to(self.state_dtype)
            self.ran.add(output.engine)
            window = place // len(self.halves)
            left[window] -= 1
            done = left.count(0)
            while summed < len(self.windows) and not left[summed]:
                self._add(total, summed, halves)
                summed += 1
            if self.on_progress is not None and not left[window] and done < len(self.windows):
                self.on_progress(Progress("step", i, len(self.sigmas) - 1, Progress("window", done, len(self.windows))))
        return total / self.counts

    def _units(self, scaled: Tensor, i: int) -> Iterator[WindowUnit]:
        """The units of step i: of each window the conditional half, then the other."""
        for n, window in enumerate(self.windows):
            latents = scaled[window.start : window.stop].clone()  # not a view: that would be sent with all of the video
            for conditional in self.halves:
                keeps = n if conditional and self.controlled else None
                yield WindowUnit(
                    size=latents.numel(), keeps=keeps, step=i, window=window, conditional=conditional, latents=latents
                )

    def _add(self, total: Tensor, n: int, halves: dict[int, Tensor]) -> None:
        """Adds window n's guided velocity to `total`, and drops its halves."""
        window, first = self.windows[n], n * len(self.halves)
        velocity = halves.pop(first)
        if len(self.halves) == 2:
            velocity = guide(halves.pop(first + 1), velocity, self.guidance_scale)
        total[window.start + window.first_counted : window.stop] += velocity[window.first_counted :]


def _nothing_told(_: object) -> None:
    """A unit is a part of one step, and reports none."""


def _as_clip(x: Tensor) -> Tensor:
    """(N, 4, h, w) -> (1, 4, N, h, w), copied."""
    return x.transpose(0, 1)[None].clone()
