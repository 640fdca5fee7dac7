"""Runs the units of ControlNeXt's denoising: one window in one guidance half at one step, under the poses' control.

`sampler.py` asks for them. Control maps are computed here, where they are used, in fixed blocks of frames, so that their bits do
not depend on which windows a replica runs. `video-models.md` 2B.6-2B.9; savings 5a to 5h of its section 5.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engines.backends.prepared import PreparedEngines
from engines.backends.shapes import Shape, ShapeFamily
from engines.checkpoints.weights import torch_dtype
from engines.controlnext.call import no_control, svd_call, svd_inputs
from engines.controlnext.checkpoint import latent_scale, load_control_net, load_unet
from engines.controlnext.config import ControlNeXtConfig, weights_of
from engines.controlnext.nets.control_net import ControlNet, Prefix
from engines.controlnext.nets.layers import Biases
from engines.controlnext.nets.unet import Control, Half, SVDUNet
from engines.controlnext.noise import NoiseRange, load_noise_range
from engines.controlnext.sampler import Sampler, WindowUnit
from engines.controlnext.spec import ControlNeXtConditioning, ControlNeXtLatents
from engines.spec import CallEngines, Checkpoint, OnProgress, OnStep, ShouldStop
from engines.stopping import check
from engines.units import LocalRunner, Report, UnitOutput

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
        self.unet, self.control_net, self.noise, self.scale = nets.unet, nets.control_net, nets.noise, nets.scale
        self.sampler = Sampler(config, nets.noise)
        self.prefixes = Budget(config.control_cache_bytes)
        families = ShapeFamily.of_pixels(config.engine.shapes, self.scale) or FAMILIES
        self.prepared = PreparedEngines(config.engine, lambda: [svd_call(self.unet)], families, config.device)

    def sample(
        self,
        conditioning: ControlNeXtConditioning,
        *,
        resume: Checkpoint | None = None,
        on_step: OnStep | None = None,
        on_progress: OnProgress | None = None,
        should_stop: ShouldStop | None = None,
    ) -> ControlNeXtLatents:
        """The video's latents, (1, 4, N, h, w): see `Sampler.sample`.

        should_stop: called before every call of a net; if it returns true, raises `Cancelled`.
        """
        runner = LocalRunner(self.begin(conditioning), should_stop)
        return self.sampler.sample(conditioning, runner, resume=resume, on_step=on_step, on_progress=on_progress)

    @property
    def engines(self) -> CallEngines:
        """See `DenoiseStage`."""
        return self.prepared.by_call

    @torch.inference_mode()
    def begin(self, conditioning: ControlNeXtConditioning) -> "Request":
        """See `DenoiseStage`."""
        return Request(self, conditioning)

    def run_unet(self, latents: Tensor, half: Half, time: Biases, control: Control | None = None) -> tuple[Tensor, str]:
        """Runs `SVDUNet.forward` with the engine prepared for it. Returns the output and the engine's name."""
        frames, _, height, width = latents.shape

        def inputs() -> dict[str, Tensor]:
            return svd_inputs(latents, half, time, control or no_control(self.unet, latents))

        shape = Shape(frames, height, width)
        return self.prepared.call("svd-controlled", shape, inputs, lambda: self.unet(latents, half, time, control))


class Request:
    """What one request needs at every step, computed once."""

    def __init__(self, stage: Denoise, conditioning: ControlNeXtConditioning):
        self.stage, self.device = stage, stage.config.device
        self.control_scale = conditioning.controlnext_cond_scale
        sigmas = stage.noise.sigmas(conditioning.num_inference_steps)
        times = [0.25 * torch.tensor(sigma, dtype=torch.float64).log().item() for sigma in sigmas[:-1]]
        self.time = stage.unet.time_biases(times, conditioning.added_ids)
        latent, embedding = (t.to(self.device) for t in (conditioning.image_latent, conditioning.image_embedding))
        self.conditional = stage.unet.guidance_half(latent, embedding)
        self.unconditional = stage.unet.guidance_half(torch.zeros_like(latent), torch.zeros_like(embedding))
        # a scale of 0 adds nothing, so the control net need not run
        self.maps = ControlMaps(stage, conditioning.poses, times) if self.control_scale else None

    @torch.inference_mode()
    def run(self, unit: WindowUnit, tell: Callable[[Report], None], should_stop: ShouldStop | None) -> UnitOutput:
        """The velocity of one window in one half, (F, 4, h, w), in the model's dtype. See `engines.units.Request`."""
        control = None
        if unit.conditional and self.maps is not None:
            control = Control(self.maps.of(unit.window.control_frames, unit.step, should_stop), self.control_scale)
        check(should_stop)
        half = self.conditional if unit.conditional else self.unconditional
        output, engine = self.stage.run_unet(unit.latents.to(self.device), half, self.time[unit.step], control)
        return UnitOutput(output.cpu(), engine)


@dataclass
class Budget:
    """Memory for the prefixes of all requests that a stage works on. spare_bytes: what is left of it."""

    spare_bytes: int


class ControlMaps:
    """A request's control maps: once a block of frames and step, not once a window, and only for the conditional half (5b)."""

    def __init__(self, stage: Denoise, poses: Tensor, times: list[float]):
        self.net, self.budget = stage.control_net, stage.prefixes
        self.device, self.dtype = stage.config.device, stage.dtype
        self.block_frames = stage.config.control_batch_frames
        self.poses = poses.split(self.block_frames)
        self.time = self.net.time_embeddings(times)
        height, width = (side // stage.scale for side in poses.shape[2:])
        self.size = ((height + 1) // 2, (width + 1) // 2)  # of the trunk after its first downsampler
        self._kept: dict[int, Prefix] = {}
        self._step, self._maps = -1, dict[int, Tensor]()

    def of(self, frames: Sequence[int], i: int, should_stop: ShouldStop | None = None) -> Tensor:
        """The maps of these frames at step i: (len(frames), C, h, w), normalised and pooled."""
        if i != self._step:
            self._step, self._maps = i, {}
        blocks = sorted({frame // self.block_frames for frame in frames})
        for k in blocks:
            if k not in self._maps:
                check(should_stop)
                self._maps[k] = self.net.finish(self._prefix(k), self.time[i : i + 1], self.size)
        places = {k: n * self.block_frames for n, k in enumerate(blocks)}
        return torch.cat([self._maps[k] for k in blocks])[
            [places[frame // self.block_frames] + frame % self.block_frames for frame in frames]
        ]

    def _prefix(self, k: int) -> Prefix:
        """Block k's part that is the same at every step; it is kept as long as the budget has room (5d)."""
        if k in self._kept:
            return self._kept[k]
        prefix = self.net.prefix(self.poses[k].to(self.device).to(self.dtype) / 255)
        if prefix.size_bytes <= self.budget.spare_bytes:
            self._kept[k] = prefix
            self.budget.spare_bytes -= prefix.size_bytes
        return prefix

    def __del__(self) -> None:
        self.budget.spare_bytes += sum(prefix.size_bytes for prefix in self._kept.values())
