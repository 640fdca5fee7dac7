"""Whole jobs from conditioning to frames: the loop over the steps and the VAE, without text encoders, DWPose and the mp4.

Ours are the loops of `denoise.py` and `decode.py` over the same nets, without their progress, checkpoints and stops. Theirs
are diffusers' modules called as its pipelines call them, and for ControlNeXt as the published code does: both halves of
guidance in one batch, and the control net at every step for both of them. Noise, sampler and rounding to levels are the same.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import torch
from diffusers import LCMScheduler
from torch import Tensor

from engines.animatediff.call import motion_call, motion_inputs
from engines.animatediff.layers import TextContext
from engines.animatediff.unet import Residuals
from engines.backends.exact_shapes import ExactShapes
from engines.backends.shapes import Shape
from engines.bench.measure import Case, Way
from engines.bench.nets import AnimateDiffNets, ControlNeXtNets
from engines.bench.options import Options
from engines.bench.unet_cases import ADDED_IDS, SLOW, engine_ways
from engines.controlnext.call import svd_call, svd_inputs
from engines.controlnext.layers import Biases
from engines.controlnext.unet import Control, Half
from engines.media.pixels import to_levels
from engines.sampling import (
    euler_step,
    guide,
    karras_sigmas,
    lcm_step,
    lcm_timesteps,
    linear_schedule,
    seeded_generator,
)

SEED, GUIDANCE = 7, 3.0
OUR_DECODE_FRAMES, CONTROL_FRAMES, CHUNK = 4, 8, 2
"""AnimateDiff's decode_chunk; ControlNeXt's control_batch_frames and decode_batch_frames, and its decode_chunk_size."""

PROFILED_STEPS = 4
"""Where its kernels' time goes is told of a job of no more: a profile holds every launch."""

MotionStep = Callable[[Tensor, Tensor, TextContext, Residuals], Tensor]
SVDCall = Callable[[Tensor, Half, Biases, Control | None], Tensor]


def animatediff_job(nets: AnimateDiffNets, options: Options) -> Case:
    """The API's defaults: guidance 1, three keyframes, nothing of SparseCtrl in the cache."""
    size, like = nets.size, nets.unet.conv_in.weight
    steps = options.steps or size.steps
    normal = partial(torch.randn, device=like.device, dtype=like.dtype)
    text, pixels = normal(1, 77, size.text_width), 8 * size.side
    keyframes = (0, size.frames // 2, size.frames - 1)
    images = torch.rand(len(keyframes), 3, pixels, pixels, device=like.device, dtype=like.dtype)

    def ours(unet: MotionStep) -> Tensor:
        schedule = linear_schedule(prediction_type="v_prediction")
        timesteps = lcm_timesteps(steps)
        context, time = nets.unet.text_context(text), nets.unet.time_embeddings(timesteps)
        net = nets.control
        residuals = net(net.columns(images), keyframes, size.frames, timesteps, net.text_context(text))
        generator = seeded_generator(SEED)
        x = torch.randn(1, 4, size.frames, size.side, size.side, generator=generator).to(like.device)
        for i, (t, t_next) in enumerate(pairwise((*timesteps, None))):
            output = unet(x.to(like.dtype), time[i : i + 1], context, residuals[i]).to(x.dtype)
            noise = None if t_next is None else torch.randn(x.shape, generator=generator).to(x.device)
            x = lcm_step(schedule, x, output, t, t_next, noise)  # type: ignore[arg-type]  # only the last is None
        for chunk in (x[0].transpose(0, 1) / nets.vae.config.scaling_factor).split(OUR_DECODE_FRAMES):
            to_levels(nets.vae.decode(chunk.to(like.dtype)).sample)
        return x

    def theirs() -> Tensor:
        scheduler = LCMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="linear", prediction_type="v_prediction", clip_sample=False
        )
        scheduler.set_timesteps(steps, device=like.device)
        repeated = text.repeat_interleave(size.frames, dim=0)
        shown = images.new_zeros(1, 3, size.frames, pixels, pixels)
        mask = images.new_zeros(1, 1, size.frames, pixels, pixels)
        shown[0, :, list(keyframes)], mask[0, :, list(keyframes)] = images.transpose(0, 1), 1.0
        generator = seeded_generator(SEED)
        x = torch.randn(1, 4, size.frames, size.side, size.side, generator=generator).to(like.device)
        for t in scheduler.timesteps:
            latents = x.to(like.dtype)
            skips, mid = nets.their_control(
                latents, t, repeated, controlnet_cond=shown, conditioning_mask=mask, return_dict=False
            )
            given = {"down_block_additional_residuals": skips, "mid_block_additional_residual": mid, "return_dict": False}
            output = nets.their_unet(latents, t, repeated, **given)[0].to(x.dtype)
            x = scheduler.step(output, t, x, generator=generator, return_dict=False)[0]
        to_levels(nets.their_vae.decode((x[0].transpose(0, 1) / nets.vae.config.scaling_factor).to(like.dtype)).sample)
        return x

    def prepared(engine: ExactShapes) -> Way:
        engine.prepare(Shape(size.frames, size.side, size.side))
        return lambda: ours(lambda *args: engine(motion_inputs(*args)))

    ways: dict[str, Callable[[], Way]] = {"diffusers": lambda: theirs, "ours": lambda: partial(ours, nets.unet)}
    ways |= engine_ways(motion_call(nets.unet), prepared, options)
    title = f"job, {pixels}x{pixels}, {size.frames} frames, {steps} steps, guidance 1, {len(keyframes)} keyframes"
    return Case("animatediff", title, ways, 2 * options.job_rounds, SLOW, profiled=steps <= PROFILED_STEPS)


def controlnext_job(nets: ControlNeXtNets, options: Options) -> Case:
    """One window of all frames, guidance 3."""
    size, unet, net = nets.size, nets.unet, nets.control
    steps = options.steps or size.steps
    like = unet.conv_in.weight
    normal = partial(torch.randn, device=like.device, dtype=like.dtype)
    image, embedding = normal(4, size.height, size.width), normal(1, size.image_width)
    poses = torch.randint(0, 256, (size.frames, 3, 8 * size.height, 8 * size.width), dtype=torch.uint8)
    sigmas = karras_sigmas(steps, 0.002, 700.0)
    times = [0.25 * torch.tensor(sigma).log().item() for sigma in sigmas[:-1]]
    shape = Shape(size.frames, size.height, size.width)
    call_of_unet = svd_call(unet)
    maps_shape = call_of_unet.shapes(shape)["control"]
    trunk = (maps_shape[2], maps_shape[3])

    def noise() -> Tensor:
        x = torch.randn(size.frames, 4, size.height, size.width, generator=seeded_generator(SEED))
        return (x * (sigmas[0] ** 2 + 1) ** 0.5).to(like.device)

    def ours(call: SVDCall) -> Tensor:
        biases = unet.time_biases(times, ADDED_IDS)
        conditional = unet.guidance_half(image, embedding)
        unconditional = unet.guidance_half(torch.zeros_like(image), torch.zeros_like(embedding))
        prefixes = [net.prefix(part.to(like.device).to(like.dtype) / 255) for part in poses.split(CONTROL_FRAMES)]
        embedded = net.time_embeddings(times)
        x = noise()
        for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            scaled = (x / (sigma**2 + 1) ** 0.5).to(like.dtype)
            maps = torch.cat([net.finish(prefix, embedded[i : i + 1], trunk) for prefix in prefixes])
            guided = call(scaled, conditional, biases[i], Control(maps, 1.0)).to(x.dtype)
            plain = call(scaled, unconditional, biases[i], None).to(x.dtype)
            x = euler_step(x, guide(plain, guided, GUIDANCE), sigma, sigma_next)
        whole = len(x) - len(x) % CHUNK
        for batch, chunk in (*((b, CHUNK) for b in x[:whole].split(CONTROL_FRAMES)), (x[whole:], len(x) - whole)):
            if len(batch):
                to_levels(nets.vae.decode((batch / nets.vae.config.scaling_factor).to(like.dtype), num_frames=chunk).sample)
        return x

    def theirs() -> Tensor:
        images = torch.stack([torch.zeros_like(image), image])[:, None].expand(-1, size.frames, -1, -1, -1)
        context = torch.stack([torch.zeros_like(embedding), embedding])
        ids = torch.tensor([ADDED_IDS, ADDED_IDS], device=like.device)
        shown = (poses.to(like.device).to(like.dtype) / 255).repeat(2, 1, 1, 1)
        shown = shown.contiguous(memory_format=torch.channels_last)
        # the published code multiplies the unconditional half's control by 0
        scale = torch.tensor([0.0, 1.0], device=like.device, dtype=like.dtype).repeat_interleave(size.frames)[:, None, None, None]
        embedded = net.time_embeddings(times)
        x = noise()
        for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            scaled = (x / (sigma**2 + 1) ** 0.5).to(like.dtype)
            maps = net.finish(net.prefix(shown), embedded[i : i + 1], trunk)
            nets.injected["control"] = Control(maps, scale)  # type: ignore[arg-type]  # one for each frame
            batch = torch.cat([scaled.expand(2, -1, -1, -1, -1), images], dim=2)  # (2, F, 8, h, w)
            t = torch.tensor(times[i], device=like.device)
            plain, guided = nets.their_unet(batch, t, context, ids, return_dict=False)[0].to(x.dtype)
            x = euler_step(x, guide(plain, guided, GUIDANCE), sigma, sigma_next)
        for chunk in x.split(CHUNK):
            latents = (chunk / nets.vae.config.scaling_factor).to(like.dtype)
            to_levels(nets.vae.decode(latents, num_frames=len(chunk)).sample)
        return x

    def prepared(engine: ExactShapes) -> Way:
        engine.prepare(shape)
        off = Control(like.new_zeros(maps_shape), 0.0)

        def call(latents: Tensor, half: Half, biases: Biases, control: Control | None) -> Tensor:
            # a control of scale 0 adds nothing, so one compiled call serves both halves
            return engine(svd_inputs(latents, half, biases, control or off))

        return lambda: ours(call)

    ways: dict[str, Callable[[], Way]] = {"diffusers": lambda: theirs, "ours": lambda: partial(ours, unet)}
    ways |= engine_ways(call_of_unet, prepared, options)
    title = f"job, {8 * size.width}x{8 * size.height}, {size.frames} frames, {steps} steps, guidance {GUIDANCE:g}"
    return Case("controlnext", title, ways, options.job_rounds, SLOW, profiled=steps <= PROFILED_STEPS)


def job_cases(nets: AnimateDiffNets | ControlNeXtNets, options: Options) -> Iterator[Case]:
    """The model's."""
    yield animatediff_job(nets, options) if isinstance(nets, AnimateDiffNets) else controlnext_job(nets, options)
