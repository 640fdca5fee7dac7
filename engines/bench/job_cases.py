"""Whole jobs from conditioning to frames: the loop over the steps and the VAE, without text encoders, DWPose and the mp4.

Our jobs run the product's own stages with the benchmark's nets. Their jobs call diffusers' modules as its pipelines do, and for
ControlNeXt as the published code does: both halves of guidance in one batch, and the control net at every step for both of
them. Noise, sampler and rounding to levels are the same.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from diffusers import LCMScheduler
from torch import Tensor

import engines.animatediff.denoise as animatediff
import engines.controlnext.denoise as controlnext
from engines.animatediff.call import motion_call
from engines.animatediff.checkpoint import ClipShape
from engines.animatediff.config import AnimateDiffConfig
from engines.animatediff.decode import call_vae as call_image_vae
from engines.animatediff.spec import AnimateDiffConditioning, SparseControlInput
from engines.backends.exact_shapes import ExactShapes
from engines.backends.shapes import Shape
from engines.backends.unet_call import UNetCall
from engines.bench.measure import Case, Way
from engines.bench.nets import AnimateDiffNets, ControlNeXtNets
from engines.bench.options import Options
from engines.bench.unet_cases import ADDED_IDS, SLOW, engine_ways
from engines.controlnext.call import svd_call
from engines.controlnext.config import ControlNeXtConfig
from engines.controlnext.decode import call_vae as call_video_vae
from engines.controlnext.nets.unet import Control
from engines.controlnext.noise import NoiseRange
from engines.controlnext.spec import ControlNeXtConditioning
from engines.diffusion.frame_decoder import FrameDecoder
from engines.errors import EngineError
from engines.media.pixels import to_levels
from engines.sampling import euler_step, guide, karras_sigmas, linear_schedule, seeded_generator

SEED, GUIDANCE = 7, 3.0
PIXELS = 8
"""Pixels per latent, in height and in width."""

DECODE_FRAMES, CONTROL_FRAMES, VIDEO_DECODE_FRAMES, CHUNK = 4, 8, 8, 2
"""AnimateDiff's decode_chunk; ControlNeXt's control_batch_frames, decode_batch_frames and decode_chunk_size."""

NOISE = NoiseRange(0.002, 700.0)

PROFILED_STEPS = 4
"""Jobs with more steps are not profiled, because a profile holds every kernel launch."""


def animatediff_job(nets: AnimateDiffNets, options: Options) -> Case:
    """A job with the API's defaults: guidance 1, three keyframes. SparseCtrl's results are not cached."""
    size, like = nets.size, nets.unet.conv_in.weight
    side, steps = PIXELS * size.side, options.steps or size.steps
    config = AnimateDiffConfig(**_placed(like), num_frames=size.frames, height=side, width=side, control_cache_bytes=0)
    parts = animatediff.Nets(
        nets.unet, {"scribble": nets.control}, linear_schedule(prediction_type="v_prediction"), ClipShape(side, side, PIXELS)
    )
    asked = _clip(nets, steps)
    job = partial(_job, asked, FrameDecoder(nets.vae, call_image_vae, DECODE_FRAMES), 1)
    call, shape = motion_call(nets.unet), Shape(size.frames, size.side, size.side)
    ours = partial(_ours, lambda: animatediff.Denoise(config, parts), job, call, shape)
    ways: dict[str, Callable[[], Way]] = {"diffusers": lambda: partial(_their_clip, nets, asked), "ours": ours}
    ways |= engine_ways(call, ours, options)
    title = f"job, {side}x{side}, {size.frames} frames, {steps} steps, guidance 1, {len(_keyframes(nets))} keyframes"
    return Case("animatediff", title, ways, 2 * options.job_rounds, SLOW, profiled=steps <= PROFILED_STEPS)


def controlnext_job(nets: ControlNeXtNets, options: Options) -> Case:
    """A job with all frames in one window, at guidance 3."""
    size, like = nets.size, nets.unet.conv_in.weight
    steps = options.steps or size.steps
    config = ControlNeXtConfig(**_placed(like), control_batch_frames=CONTROL_FRAMES)
    parts = controlnext.Nets(nets.unet, nets.control, NOISE, PIXELS)
    asked = _video(nets, steps)
    job = partial(_job, asked, FrameDecoder(nets.vae, call_video_vae, VIDEO_DECODE_FRAMES), CHUNK)
    call, shape = svd_call(nets.unet), Shape(size.frames, size.height, size.width)
    ours = partial(_ours, lambda: controlnext.Denoise(config, parts), job, call, shape)
    ways: dict[str, Callable[[], Way]] = {"diffusers": lambda: partial(_their_video, nets, asked), "ours": ours}
    ways |= engine_ways(call, ours, options)
    title = f"job, {PIXELS * size.width}x{PIXELS * size.height}, {size.frames} frames, {steps} steps, guidance {GUIDANCE:g}"
    return Case("controlnext", title, ways, options.job_rounds, SLOW, profiled=steps <= PROFILED_STEPS)


def job_cases(nets: AnimateDiffNets | ControlNeXtNets, options: Options) -> Iterator[Case]:
    """The jobs of the model."""
    yield animatediff_job(nets, options) if isinstance(nets, AnimateDiffNets) else controlnext_job(nets, options)


def _ours(
    make_stage: Callable[[], Any],
    job: Callable[[Any, str], Tensor],
    call: UNetCall,
    shape: Shape,
    engine: ExactShapes | None = None,
) -> Way:
    """A job by a new stage that runs the UNet's call with `engine`, or eagerly without one."""
    stage = make_stage()
    if engine is None:
        return lambda: job(stage, "eager")
    engine.prepare(shape)
    stage.prepared.add(call, engine)
    return lambda: job(stage, engine.name)


def _job(conditioning: Any, decoder: FrameDecoder, chunk_frames: int, stage: Any, engine: str) -> Tensor:
    """Samples latents, decodes them and returns them. Raises `EngineError` if another engine than `engine` ran the UNet."""
    latents = stage.sample(conditioning)
    if latents.engine != engine:
        raise EngineError(f"the UNet was run by {latents.engine}, not by {engine}")
    for _ in decoder.frames(latents.values, chunk_frames):
        pass
    values: Tensor = latents.values
    return values


def _keyframes(nets: AnimateDiffNets) -> tuple[int, ...]:
    return 0, nets.size.frames // 2, nets.size.frames - 1


def _clip(nets: AnimateDiffNets, steps: int) -> AnimateDiffConditioning:
    size, like, frames = nets.size, nets.unet.conv_in.weight, _keyframes(nets)
    text = torch.randn(1, 77, size.text_width, device=like.device, dtype=like.dtype)
    side = PIXELS * size.side
    images = torch.rand(len(frames), 3, side, side, device=like.device, dtype=like.dtype)
    control = SparseControlInput("scribble", images, frames, "a benchmark's")
    return AnimateDiffConditioning(SEED, steps, 1.0, seeded_generator(SEED).get_state(), (), text, control)


def _their_clip(nets: AnimateDiffNets, asked: AnimateDiffConditioning) -> Tensor:
    size, like, control = nets.size, nets.unet.conv_in.weight, asked.control
    assert control is not None
    scheduler = LCMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="linear", prediction_type="v_prediction", clip_sample=False
    )
    scheduler.set_timesteps(asked.num_inference_steps, device=like.device)
    repeated = asked.text.repeat_interleave(size.frames, dim=0)
    pixels = control.values.shape[-2:]
    shown = control.values.new_zeros(1, 3, size.frames, *pixels)
    mask = control.values.new_zeros(1, 1, size.frames, *pixels)
    shown[0, :, list(control.frames)], mask[0, :, list(control.frames)] = control.values.transpose(0, 1), 1.0
    generator = seeded_generator(asked.seed)
    x = torch.randn(1, 4, size.frames, size.side, size.side, generator=generator).to(like.device)
    for t in scheduler.timesteps:
        latents = x.to(like.dtype)
        skips, mid = nets.their_control(latents, t, repeated, controlnet_cond=shown, conditioning_mask=mask, return_dict=False)
        given = {"down_block_additional_residuals": skips, "mid_block_additional_residual": mid, "return_dict": False}
        output = nets.their_unet(latents, t, repeated, **given)[0].to(x.dtype)
        x = scheduler.step(output, t, x, generator=generator, return_dict=False)[0]
    to_levels(nets.their_vae.decode((x[0].transpose(0, 1) / nets.vae.config.scaling_factor).to(like.dtype)).sample)
    return x.cpu()


def _video(nets: ControlNeXtNets, steps: int) -> ControlNeXtConditioning:
    size, like = nets.size, nets.unet.conv_in.weight
    normal = partial(torch.randn, device=like.device, dtype=like.dtype)
    image, embedding = normal(4, size.height, size.width), normal(1, size.image_width)
    pixels = (PIXELS * size.height, PIXELS * size.width)
    return ControlNeXtConditioning(
        seed=SEED,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        rng_state=seeded_generator(SEED).get_state(),
        notes=(),
        poses=torch.randint(0, 256, (size.frames, 3, *pixels), dtype=torch.uint8),
        image_embedding=embedding,
        image_latent=image,
        added_ids=ADDED_IDS,
        batch_frames=size.frames,
        overlap=1,  # there is one window only
        controlnext_cond_scale=1.0,
        decode_chunk_size=CHUNK,
        fps=7,
    )


def _their_video(nets: ControlNeXtNets, asked: ControlNeXtConditioning) -> Tensor:
    size, net, like = nets.size, nets.control, nets.unet.conv_in.weight
    sigmas = karras_sigmas(asked.num_inference_steps, NOISE.sigma_min, NOISE.sigma_max)
    times = [0.25 * torch.tensor(sigma).log().item() for sigma in sigmas[:-1]]
    image, embedding = asked.image_latent, asked.image_embedding
    images = torch.stack([torch.zeros_like(image), image])[:, None].expand(-1, size.frames, -1, -1, -1)
    context = torch.stack([torch.zeros_like(embedding), embedding])
    ids = torch.tensor([ADDED_IDS, ADDED_IDS], device=like.device)
    shown = (asked.poses.to(like.device).to(like.dtype) / 255).repeat(2, 1, 1, 1)
    shown = shown.contiguous(memory_format=torch.channels_last)
    # the published code multiplies the unconditional half's control by 0
    scale = torch.tensor([0.0, 1.0], device=like.device, dtype=like.dtype).repeat_interleave(size.frames)[:, None, None, None]
    embedded = net.time_embeddings(times)
    trunk = ((size.height + 1) // 2, (size.width + 1) // 2)
    x = torch.randn(size.frames, 4, size.height, size.width, generator=seeded_generator(asked.seed))
    x = (x * (sigmas[0] ** 2 + 1) ** 0.5).to(like.device)
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        scaled = (x / (sigma**2 + 1) ** 0.5).to(like.dtype)
        maps = net.finish(net.prefix(shown), embedded[i : i + 1], trunk)
        nets.injected["control"] = Control(maps, scale)  # type: ignore[arg-type]  # one for each frame
        batch = torch.cat([scaled.expand(2, -1, -1, -1, -1), images], dim=2)  # (2, F, 8, h, w)
        t = torch.tensor(times[i], device=like.device)
        plain, guided = nets.their_unet(batch, t, context, ids, return_dict=False)[0].to(x.dtype)
        x = euler_step(x, guide(plain, guided, asked.guidance_scale), sigma, sigma_next)
    for chunk in x.split(asked.decode_chunk_size):
        latents = (chunk / nets.vae.config.scaling_factor).to(like.dtype)
        to_levels(nets.vae.decode(latents, num_frames=len(chunk)).sample)
    return x.transpose(0, 1)[None].cpu()


def _placed(like: Tensor) -> dict[str, Any]:
    """The device and the dtype of `like`, as a config names them."""
    return {"device": str(like.device), "dtype": str(like.dtype).removeprefix("torch.")}
