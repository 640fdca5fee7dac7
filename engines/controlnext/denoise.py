"""Noise to latents: Euler steps of a whole video, each the average of overlapping windows under the poses' control.

A unit of work is one window in one guidance half; units of a step do not depend on each other. Predictions are averaged
and the sampler steps once on the whole video, which is the same as averaging stepped windows (5c). Frames are summed in
the order of their windows, so the result does not depend on where or in which order units ran. `video-models.md` 2B.6-2B.9;
savings 5a to 5h of its section 5.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engines.backends.prepared import PreparedEngines
from engines.backends.shapes import Shape, ShapeFamily
from engines.checkpoints.weights import torch_dtype
from engines.controlnext.call import no_control, svd_call, svd_inputs
from engines.controlnext.checkpoint import NoiseRange, latent_scale, load_control_net, load_noise_range, load_unet, weights_of
from engines.controlnext.config import ControlNeXtConfig
from engines.controlnext.nets.control_net import ControlNet, Prefix
from engines.controlnext.nets.layers import Biases
from engines.controlnext.nets.unet import Control, Half, SVDUNet
from engines.controlnext.spec import ControlNeXtConditioning, ControlNeXtLatents
from engines.controlnext.windows import Window, times_counted, windows
from engines.diffusion.step_loop import run_steps
from engines.sampling import euler_step, guide, karras_sigmas, restored_generator
from engines.spec import CallEngines, Checkpoint, OnProgress, OnStep, Progress, ShouldStop
from engines.stopping import check

FAMILIES = (ShapeFamily.fixed(24, 128, 72), ShapeFamily(Shape(2, 128, 72), Shape(14, 128, 72), Shape(25, 128, 72)))
"""The API's default window at 576x1024, and the windows of shorter videos and other `batch_frames`."""


@dataclass(frozen=True)
class Nets:
    """The parts of the checkpoints that denoising needs. noise: range of the sigmas. scale: pixels per latent, each way."""

    unet: SVDUNet
    control_net: ControlNet
    noise: NoiseRange
    scale: int


def load_nets(config: ControlNeXtConfig) -> Nets:
    """Loads the nets. Raises `WeightsError` for checkpoints that do not fit."""
    weights = weights_of(config)
    scale, noise = latent_scale(weights), load_noise_range(weights)
    return Nets(load_unet(config), load_control_net(config), noise, scale)


class Denoise:
    """Holds the UNet and the control net. nets: used by benchmarks instead of the config's weights."""

    def __init__(self, config: ControlNeXtConfig, nets: Nets | None = None):
        nets = nets or load_nets(config)
        self.config = config
        self.dtype = torch_dtype(config.dtype)
        self.state_dtype = torch.promote_types(self.dtype, torch.float32)  # of the latents between steps
        self.unet, self.control_net, self.noise, self.scale = nets.unet, nets.control_net, nets.noise, nets.scale
        families = ShapeFamily.of_pixels(config.engine.shapes, self.scale) or FAMILIES
        self.prepared = PreparedEngines(config.engine, lambda: [svd_call(self.unet)], families, config.device)

    @torch.inference_mode()
    def sample(
        self,
        conditioning: ControlNeXtConditioning,
        *,
        resume: Checkpoint | None = None,
        on_step: OnStep | None = None,
        on_progress: OnProgress | None = None,
        should_stop: ShouldStop | None = None,
    ) -> ControlNeXtLatents:
        """The video's latents, (1, 4, N, h, w).

        on_step, on_progress: see `run_steps`; `resume` takes a checkpoint of `on_step`.
        on_progress: also called within a step, after each window but the last.
        should_stop: called before every call of a net; if it returns true, raises `Cancelled`.
        Raises `GenerationFailed` on non-finite latents.
        """
        run = _Run(self, conditioning, on_progress, should_stop)
        start = resume or self._start(conditioning)
        if (start.steps, start.latents.shape[2]) != (conditioning.num_inference_steps, len(conditioning.poses)):
            raise ValueError("the checkpoint belongs to another request")
        # contiguous, as between steps: a checkpoint from a file is not, and other strides could mean other kernels and other bits
        x = start.latents[0].transpose(0, 1).contiguous().to(self.config.device)  # (N, 4, h, w)
        x = run_steps(run.step, start, x, _as_clip, run.ran, on_step, on_progress)
        made = (_as_clip(x), conditioning.seed, conditioning.decode_chunk_size, conditioning.fps)
        return ControlNeXtLatents(*made, engine="+".join(sorted(run.ran)))

    @property
    def engines(self) -> CallEngines:
        """See `DenoiseStage`."""
        return self.prepared.by_call

    def run_unet(self, latents: Tensor, half: Half, time: Biases, control: Control | None = None) -> tuple[Tensor, str]:
        """Runs `SVDUNet.forward` with the engine prepared for it. Returns the output and the engine's name."""
        frames, _, height, width = latents.shape

        def inputs() -> dict[str, Tensor]:
            return svd_inputs(latents, half, time, control or no_control(self.unet, latents))

        shape = Shape(frames, height, width)
        return self.prepared.call("svd-controlled", shape, inputs, lambda: self.unet(latents, half, time, control))

    def _start(self, conditioning: ControlNeXtConditioning) -> Checkpoint:
        """Noise at the largest sigma, drawn after the reference image's noise."""
        generator = restored_generator(conditioning.rng_state)
        num_frames, _, height, width = conditioning.poses.shape
        shape = (1, num_frames, self.unet.latent_channels, height // self.scale, width // self.scale)
        noise = torch.randn(shape, generator=generator).to(self.state_dtype)
        latents = noise.transpose(1, 2) * (self.noise.sigma_max**2 + 1) ** 0.5
        return Checkpoint(0, conditioning.num_inference_steps, latents, generator.get_state())


class _Run:
    """What one request needs at every step, computed once."""

    def __init__(
        self,
        stage: Denoise,
        conditioning: ControlNeXtConditioning,
        on_progress: OnProgress | None,
        should_stop: ShouldStop | None,
    ):
        num_frames = len(conditioning.poses)
        self.stage, self.on_progress, self.should_stop = stage, on_progress, should_stop
        self.guidance_scale = conditioning.guidance_scale
        self.control_scale = conditioning.controlnext_cond_scale
        self.sigmas = karras_sigmas(conditioning.num_inference_steps, stage.noise.sigma_min, stage.noise.sigma_max)
        self.ran: set[str] = set()  # the engines' names
        self.windows = windows(num_frames, conditioning.batch_frames, conditioning.overlap)
        counts = torch.tensor(times_counted(num_frames, self.windows), device=stage.config.device)
        self.counts = counts[:, None, None, None]  # (N, 1, 1, 1)
        times = [0.25 * torch.tensor(sigma, dtype=torch.float64).log().item() for sigma in self.sigmas[:-1]]
        self.time = stage.unet.time_biases(times, conditioning.added_ids)
        latent, embedding = (t.to(stage.config.device) for t in (conditioning.image_latent, conditioning.image_embedding))
        self.conditional = stage.unet.guidance_half(latent, embedding)
        self.unconditional = stage.unet.guidance_half(torch.zeros_like(latent), torch.zeros_like(embedding))
        # a scale of 0 adds nothing, so the control net need not run
        self.maps = ControlMaps(stage, conditioning.poses, times, should_stop) if self.control_scale else None

    def step(self, x: Tensor, i: int, _: torch.Generator) -> Tensor:
        """See `RunStep`. x: (N, 4, h, w). An Euler step draws no noise."""
        return euler_step(x, self._predict(x, i), self.sigmas[i], self.sigmas[i + 1])

    def _predict(self, x: Tensor, i: int) -> Tensor:
        """The guided velocity at step i, averaged over the windows. x: (N, 4, h, w)."""
        scaled = (x / (self.sigmas[i] ** 2 + 1) ** 0.5).to(self.stage.dtype)
        maps = None if self.maps is None else self.maps.at_step(i)
        total = torch.zeros_like(x)
        for done, window in enumerate(self.windows, start=1):
            velocity = self._guided(scaled[window.start : window.stop], maps, window, i)
            total[window.start + window.first_counted : window.stop] += velocity[window.first_counted :]
            if self.on_progress is not None and done < len(self.windows):
                self.on_progress(Progress("step", i, len(self.sigmas) - 1, Progress("window", done, len(self.windows))))
        return total / self.counts

    def _guided(self, latents: Tensor, maps: Tensor | None, window: Window, i: int) -> Tensor:
        """The velocity of one window. At guidance 1 the unconditional half is not needed (5h)."""
        control = None if maps is None else Control(maps[window.control_frames], self.control_scale)
        check(self.should_stop)
        conditional = self._half(latents, self.conditional, i, control)
        if self.guidance_scale == 1:
            return conditional
        check(self.should_stop)
        return guide(self._half(latents, self.unconditional, i), conditional, self.guidance_scale)

    def _half(self, latents: Tensor, half: Half, i: int, control: Control | None = None) -> Tensor:
        output, engine = self.stage.run_unet(latents, half, self.time[i], control)
        self.ran.add(engine)
        return output.to(self.stage.state_dtype)


class ControlMaps:
    """The control maps of all frames at a step: once a frame, not once a window, and only for the conditional half (5b)."""

    def __init__(self, stage: Denoise, poses: Tensor, times: list[float], should_stop: ShouldStop | None):
        self.net, self.should_stop = stage.control_net, should_stop
        self.device, self.dtype = stage.config.device, stage.dtype
        self.poses = poses.split(stage.config.control_batch_frames)
        self.time = self.net.time_embeddings(times)
        height, width = (side // stage.scale for side in poses.shape[2:])
        self.size = ((height + 1) // 2, (width + 1) // 2)  # of the trunk after its first downsampler
        self.spare_bytes = stage.config.control_cache_bytes
        self._kept: list[Prefix] = []

    def at_step(self, i: int) -> Tensor:
        """(N, C, h, w), normalised and pooled."""
        maps = []
        for k in range(len(self.poses)):
            check(self.should_stop)
            maps.append(self.net.finish(self._prefix(k), self.time[i : i + 1], self.size))
        return torch.cat(maps)

    def _prefix(self, k: int) -> Prefix:
        """The k-th batch's part that is the same at every step; it is kept as long as the cache has room (5d)."""
        if k < len(self._kept):
            return self._kept[k]
        prefix = self.net.prefix(self.poses[k].to(self.device).to(self.dtype) / 255)
        if k == len(self._kept) and prefix.size_bytes <= self.spare_bytes:
            self._kept.append(prefix)
            self.spare_bytes -= prefix.size_bytes
        return prefix


def _as_clip(x: Tensor) -> Tensor:
    """(N, 4, h, w) -> (1, 4, N, h, w), on the host."""
    return x.transpose(0, 1)[None].to("cpu", copy=True)
