"""Noise to latents: LCM steps of the motion UNet with SparseCtrl; after each step the run can report, stop and be resumed."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engines.animatediff.call import call_name, motion_call, motion_inputs, no_residuals
from engines.animatediff.checkpoint import (
    ClipShape,
    clip_shape,
    load_schedule,
    load_sparse_control,
    load_unet,
    weights_of,
)
from engines.animatediff.config import AnimateDiffConfig
from engines.animatediff.nets.layers import TextContext
from engines.animatediff.nets.sparse_control import ResidualCache, SparseControl
from engines.animatediff.nets.unet import MotionUNet, Residuals
from engines.animatediff.spec import AnimateDiffConditioning, ControlType, SparseControlInput
from engines.backends.prepared import PreparedEngines
from engines.backends.shapes import Shape, ShapeFamily
from engines.backends.unet_call import UNetCall
from engines.checkpoints.weights import torch_dtype
from engines.diffusion.step_loop import run_steps
from engines.sampling import NoiseSchedule, guide, lcm_step, lcm_timesteps, restored_generator
from engines.spec import CallEngines, Checkpoint, Latents, OnProgress, OnStep, ShouldStop
from engines.stopping import check


@dataclass(frozen=True)
class Nets:
    """The parts of the checkpoints that denoising needs."""

    unet: MotionUNet
    controls: Mapping[ControlType, SparseControl]
    schedule: NoiseSchedule
    shape: ClipShape


def load_nets(config: AnimateDiffConfig) -> Nets:
    """Loads the nets. Raises `WeightsError` for checkpoints that do not fit."""
    shape, schedule, unet = clip_shape(config), load_schedule(weights_of(config)), load_unet(config)
    kinds: tuple[ControlType, ...] = ("scribble", "rgb")
    return Nets(unet, {kind: load_sparse_control(config, kind) for kind in kinds}, schedule, shape)


class Denoise:
    """Holds the UNet and both SparseCtrl nets. nets: used by benchmarks instead of the config's weights."""

    def __init__(self, config: AnimateDiffConfig, nets: Nets | None = None):
        nets = nets or load_nets(config)
        self.config = config
        self.dtype = torch_dtype(config.dtype)
        self.unet, self.controls, self.schedule, self.shape = nets.unet, nets.controls, nets.schedule, nets.shape
        self.residuals = ResidualCache(config.control_cache_bytes)
        height, width = self.shape.height, self.shape.width
        shapes = config.engine.shapes or ((config.num_frames, height, width),)
        families = ShapeFamily.of_pixels(shapes, self.shape.scale)
        self.prepared = PreparedEngines(config.engine, self._calls, families, config.device)
        self.control_steps = config.control_steps or (1 if config.device == "cpu" else 4)

    @torch.inference_mode()
    def sample(
        self,
        conditioning: AnimateDiffConditioning,
        *,
        resume: Checkpoint | None = None,
        on_step: OnStep | None = None,
        on_progress: OnProgress | None = None,
        should_stop: ShouldStop | None = None,
    ) -> Latents:
        """The clip's latents, (1, 4, F, h, w).

        on_step, on_progress: see `run_steps`; `resume` takes a checkpoint of `on_step`.
        should_stop: called before every call of a net; if it returns true, raises `Cancelled`.
        Raises `GenerationFailed` on non-finite latents.
        """
        run = _Run(self, conditioning, should_stop)
        start = resume or self._start(conditioning)
        x = run_steps(run.step, start, start.latents.to(self.config.device), Tensor.cpu, run.ran, on_step, on_progress)
        return Latents(x.cpu(), conditioning.seed, engine="+".join(sorted(run.ran)))

    @property
    def engines(self) -> CallEngines:
        """See `DenoiseStage`."""
        return self.prepared.by_call

    def run_unet(self, latents: Tensor, time: Tensor, context: TextContext, residuals: Residuals | None) -> tuple[Tensor, str]:
        """Runs `MotionUNet.forward` with the engine prepared for it. Returns the output and the engine's name."""
        name, shape = call_name(len(latents), controlled=True), Shape(*latents.shape[2:])

        def inputs() -> dict[str, Tensor]:
            return motion_inputs(latents, time, context, residuals or no_residuals(self.unet, latents))

        return self.prepared.call(name, shape, inputs, lambda: self.unet(latents, time, context, residuals))

    def _calls(self) -> list[UNetCall]:
        """The UNet's calls with and without guidance. Without keyframes the residuals are zeros."""
        return [motion_call(self.unet, halves) for halves in (1, 2)]

    def _start(self, conditioning: AnimateDiffConditioning) -> Checkpoint:
        """Standard normal latents, drawn after the noise of the VAE's posterior if there was any."""
        generator = restored_generator(conditioning.rng_state)
        height, width = self.shape.height // self.shape.scale, self.shape.width // self.shape.scale
        channels = self.unet.conv_in.in_channels
        latents = torch.randn((1, channels, self.config.num_frames, height, width), generator=generator)
        return Checkpoint(0, conditioning.num_inference_steps, latents, generator.get_state())


class _Run:
    """What one request needs at every step, computed once."""

    def __init__(self, stage: Denoise, conditioning: AnimateDiffConditioning, should_stop: ShouldStop | None):
        self.stage = stage
        self.should_stop = should_stop
        self.guidance_scale = conditioning.guidance_scale
        self.control = conditioning.control
        self.timesteps = lcm_timesteps(conditioning.num_inference_steps, len(stage.schedule.alphas_cumprod))
        self.text = conditioning.text.to(stage.config.device, stage.dtype)
        self.context = stage.unet.text_context(self.text)
        self.time = stage.unet.time_embeddings(self.timesteps)
        self._chunk: tuple[int, list[Residuals]] = (-1, [])
        self.ran: set[str] = set()  # the engines' names

    def step(self, x: Tensor, i: int, generator: torch.Generator) -> Tensor:
        """See `RunStep`. x: (1, 4, F, h, w)."""
        t, t_next = self.timesteps[i], self.timesteps[i + 1] if i + 1 < len(self.timesteps) else None
        output = self._predict(x, i)
        noise = None if t_next is None else torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
        return lcm_step(self.stage.schedule, x, output, t, t_next, noise)

    def _predict(self, x: Tensor, i: int) -> Tensor:
        """The UNet's guided output at step i. x: (1, 4, F, h, w)."""
        residuals = None if self.control is None else self._residuals(self.control, i)
        check(self.should_stop)
        halves = x.to(self.stage.dtype).expand(len(self.text), -1, -1, -1, -1)
        output, engine = self.stage.run_unet(halves, self.time[i : i + 1], self.context, residuals)
        self.ran.add(engine)
        output = output.to(x.dtype)
        if len(output) == 1:
            return output
        unconditional, conditional = output.chunk(2)
        return guide(unconditional, conditional, self.guidance_scale)

    def _residuals(self, control: SparseControlInput, i: int) -> Residuals:
        """SparseCtrl's residuals for step i. They are computed for a chunk of steps at once, and the run holds one chunk only."""
        size = self.stage.control_steps
        if self._chunk[0] != i // size:
            timesteps = self.timesteps[i // size * size :][:size]
            key = (control.key, timesteps)
            if (residuals := self.stage.residuals.get(key)) is None:
                check(self.should_stop)
                residuals = self._sparse_control(control, timesteps)
                self.stage.residuals.put(key, residuals)
            self._chunk = (i // size, residuals)
        return self._chunk[1][i % size]

    def _sparse_control(self, control: SparseControlInput, timesteps: tuple[int, ...]) -> list[Residuals]:
        net = self.stage.controls[control.type]
        columns = net.columns(control.values.to(self.text))
        context: TextContext = net.text_context(self.text)
        return net(columns, control.frames, self.stage.config.num_frames, timesteps, context)
