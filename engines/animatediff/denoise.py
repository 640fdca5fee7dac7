"""Noise to latents: LCM steps of the motion UNet with SparseCtrl; after each step the run can report, stop and be resumed."""

from collections.abc import Callable, Mapping
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
from engines.animatediff.sampler import Sampler
from engines.animatediff.spec import AnimateDiffConditioning, ControlType, SparseControlInput
from engines.backends.prepared import PreparedEngines
from engines.backends.shapes import Shape, ShapeFamily
from engines.backends.unet_call import UNetCall
from engines.checkpoints.weights import torch_dtype
from engines.diffusion.step_loop import run_steps
from engines.sampling import NoiseSchedule, guide, lcm_step, lcm_timesteps, restored_generator
from engines.spec import CallEngines, Checkpoint, Latents, OnProgress, OnStep, ShouldStop
from engines.stopping import check
from engines.units import LocalRunner, Report, Steps, UnitOutput


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
        runner = LocalRunner(self.begin(conditioning), should_stop)
        return Sampler().sample(conditioning, runner, resume=resume, on_step=on_step, on_progress=on_progress)

    @torch.inference_mode()
    def begin(self, conditioning: AnimateDiffConditioning) -> "Request":
        """See `DenoiseStage`."""
        return Request(self, conditioning)

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


class Request:
    """What one request needs at every step, computed once."""

    def __init__(self, stage: Denoise, conditioning: AnimateDiffConditioning):
        self.stage, self.conditioning = stage, conditioning
        self.guidance_scale = conditioning.guidance_scale
        self.control = conditioning.control
        self.timesteps = lcm_timesteps(conditioning.num_inference_steps, len(stage.schedule.alphas_cumprod))
        self.text = conditioning.text.to(stage.config.device, stage.dtype)
        self.context = stage.unet.text_context(self.text)
        self.time = stage.unet.time_embeddings(self.timesteps)
        self._chunk: tuple[int, list[Residuals]] = (-1, [])

    @torch.inference_mode()
    def run(self, unit: Steps, tell: Callable[[Report], None], should_stop: ShouldStop | None) -> UnitOutput:
        """The clip's latents, (1, 4, F, h, w), fp32. tell: is given every step. See `engines.units.Request`."""
        start = unit.start or self._start()
        ran: set[str] = set()  # the engines' names

        def step(x: Tensor, i: int, generator: torch.Generator) -> Tensor:
            return self._step(x, i, generator, ran, should_stop)

        x = run_steps(step, start, start.latents.to(self.stage.config.device), Tensor.cpu, ran, tell, tell)
        return UnitOutput(x.cpu(), "+".join(sorted(ran)))

    def _start(self) -> Checkpoint:
        """Standard normal latents, drawn after the noise of the VAE's posterior if there was any."""
        generator = restored_generator(self.conditioning.rng_state)
        shape, channels = self.stage.shape, self.stage.unet.conv_in.in_channels
        size = (self.stage.config.num_frames, shape.height // shape.scale, shape.width // shape.scale)
        latents = torch.randn((1, channels, *size), generator=generator)
        return Checkpoint(0, self.conditioning.num_inference_steps, latents, generator.get_state())

    def _step(self, x: Tensor, i: int, generator: torch.Generator, ran: set[str], should_stop: ShouldStop | None) -> Tensor:
        """See `RunStep`. x: (1, 4, F, h, w)."""
        t, t_next = self.timesteps[i], self.timesteps[i + 1] if i + 1 < len(self.timesteps) else None
        output, engine = self._predict(x, i, should_stop)
        ran.add(engine)
        noise = None if t_next is None else torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
        return lcm_step(self.stage.schedule, x, output, t, t_next, noise)

    def _predict(self, x: Tensor, i: int, should_stop: ShouldStop | None) -> tuple[Tensor, str]:
        """The UNet's guided output at step i, and the engine's name. x: (1, 4, F, h, w)."""
        residuals = None if self.control is None else self._residuals(self.control, i, should_stop)
        check(should_stop)
        halves = x.to(self.stage.dtype).expand(len(self.text), -1, -1, -1, -1)
        output, engine = self.stage.run_unet(halves, self.time[i : i + 1], self.context, residuals)
        output = output.to(x.dtype)
        if len(output) == 1:
            return output, engine
        unconditional, conditional = output.chunk(2)
        return guide(unconditional, conditional, self.guidance_scale), engine

    def _residuals(self, control: SparseControlInput, i: int, should_stop: ShouldStop | None) -> Residuals:
        """SparseCtrl's residuals for step i. They are computed for a chunk of steps at once, and the run holds one chunk only."""
        size = self.stage.control_steps
        if self._chunk[0] != i // size:
            timesteps = self.timesteps[i // size * size :][:size]
            key = (control.key, timesteps)
            if (residuals := self.stage.residuals.get(key)) is None:
                check(should_stop)
                residuals = self._sparse_control(control, timesteps)
                self.stage.residuals.put(key, residuals)
            self._chunk = (i // size, residuals)
        return self._chunk[1][i % size]

    def _sparse_control(self, control: SparseControlInput, timesteps: tuple[int, ...]) -> list[Residuals]:
        net = self.stage.controls[control.type]
        columns = net.columns(control.values.to(self.text))
        context: TextContext = net.text_context(self.text)
        return net(columns, control.frames, self.stage.config.num_frames, timesteps, context)
