"""A slow, direct implementation of ControlNeXt SVD v2, which our engine must equal.

Written from `video-models.md` (1B, 2B, 8B), without the savings of its section 5 and without code from `engines`. At any
guidance, every window computes both guidance halves and the control net; windows are stepped separately and then averaged.
Works in float32 and float64. The sinusoids of times, ids and frame positions are always float32, as in diffusers' `Timesteps`.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import Downsample2D, ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional

SIGMA_MAX, SIGMA_MIN, RHO = 700.0, 0.002, 7
CONTROL_STRENGTH = 0.2
IMAGE_NOISE = 0.02
LATENT_SCALE = 0.18215
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# fmt: off
SIGMAS_25 = (
    700.0, 545.73, 421.57, 322.45, 244.02, 182.55, 134.85, 98.27, 70.54, 49.81, 34.54, 23.47, 15.59,
    10.10, 6.354, 3.870, 2.269, 1.273, 0.678, 0.339, 0.157, 0.0664, 0.0248, 0.0079, 0.002, 0.0,
)
# fmt: on
"""The list of section 2B.8 for 25 steps, rounded as there, to half a unit of the last digit."""

Net = TypeVar("Net", bound=nn.Module)


# The control net, section 1B


class ReferenceControlNet(nn.Module):
    """From pose images and a time to one feature map per frame. Its 52 keys are those of the checkpoint.

    The page gives no eps for the norms of `embedding` and `mid_convs`, so it is torch's default, 1e-5 (1e-6 in `down_res`).
    """

    def __init__(
        self,
        *,
        stem_channels: tuple[int, int, int] = (64, 64, 128),
        level_channels: tuple[int, int] = (128, 256),
        out_channels: int = 320,
        stem_groups: int = 2,
        level_groups: tuple[int, int] = (4, 8),
        mid_groups: int = 8,
        time_channels: int = 128,
        time_embed_dim: int = 256,
    ) -> None:
        super().__init__()
        first, second, third = stem_channels
        last = level_channels[-1]
        self.time_proj = Timesteps(time_channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(time_channels, time_embed_dim)
        self.embedding = nn.Sequential(
            nn.Conv2d(3, first, 3, stride=2, padding=1),
            nn.GroupNorm(stem_groups, first),
            nn.ReLU(),
            nn.Conv2d(first, second, 3, padding=0),
            nn.GroupNorm(stem_groups, second),
            nn.ReLU(),
            nn.Conv2d(second, third, 3, padding=0),
            nn.GroupNorm(stem_groups, third),
            nn.ReLU(),
        )
        self.down_res, self.down_sample = nn.ModuleList(), nn.ModuleList()
        entering = third
        for channels, groups in zip(level_channels, level_groups, strict=True):
            self.down_res.append(
                ResnetBlock2D(in_channels=entering, out_channels=channels, temb_channels=time_embed_dim, groups=groups, eps=1e-6)
            )
            # Under the name "conv", its default, diffusers registers the convolution twice.
            self.down_sample.append(Downsample2D(channels, use_conv=True, padding=1, name="op"))
            entering = channels
        self.mid_convs = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Conv2d(last, last, 3, padding=1),
                    nn.ReLU(),
                    nn.GroupNorm(mid_groups, last),
                    nn.Conv2d(last, last, 3, padding=1),
                    nn.GroupNorm(mid_groups, last),
                ),
                nn.Conv2d(last, out_channels, 1),
            ]
        )

    def forward(self, sample: Tensor, t: Tensor | float) -> Tensor:
        """sample: (N, 3, H, W), in [0, 1]. t: 0.25 ln sigma, a scalar. Returns (N, out_channels, about H/8, about W/8)."""
        times = torch.as_tensor(t, device=sample.device).reshape(1).expand(sample.shape[0])
        embedded = self.time_embedding(self.time_proj(times).to(sample.dtype))
        x = self.embedding(sample)
        for resnet, downsample in zip(self.down_res, self.down_sample, strict=True):
            x = downsample(resnet(x, embedded))
        x = self.mid_convs[0](x) + x
        return self.mid_convs[1](x)


# Noise levels and windows, sections 2B.6 and 2B.8


def sigmas(n: int) -> Tensor:
    """(n + 1,), float64: s_i = (700^(1/7) + i/(n-1) (0.002^(1/7) - 700^(1/7)))^7 for i below n, then 0."""
    high, low = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    levels = [(high + (i / (n - 1) if n > 1 else 0.0) * (low - high)) ** RHO for i in range(n)]
    return torch.tensor([*levels, 0.0], dtype=torch.float64)


def timesteps(levels: Tensor) -> Tensor:
    """levels: (n + 1,), of `sigmas`. Returns (n,), float64: 0.25 ln s of all but the last."""
    return 0.25 * levels[:-1].log()


def windows(n: int, batch_frames: int, overlap: int) -> list[range]:
    """The frames of each window: all in one where n <= overlap (section 3B).

    Overlap 0 is allowed, and leaves the first frame of every later window uncovered: `sample` then gives NaN.
    Raises `ValueError` for an overlap of `batch_frames` or more.
    """
    if not 0 <= overlap < batch_frames:
        raise ValueError(f"overlap {overlap} does not fit windows of {batch_frames} frames")
    if n <= overlap:
        return [range(n)]
    b = min(batch_frames, n)
    return [range(n - b, n) if i + b > n else range(i, i + b) for i in range(0, n - overlap, b - overlap)]


# The UNet with the injection, section 1B


def cross_normalized(control: Tensor, features: Tensor) -> Tensor:
    """c' = (c - mean c) * std(s) / (std(c) + 1e-5) + mean s, each over (C, H, W) of one frame, then pooled to s's size.

    control: (B*F, C, h', w'). features: (B*F, C, h, w). The standard deviations are unbiased. Returns (B*F, C, h, w).
    """
    axes = (1, 2, 3)
    control_std, control_mean = torch.std_mean(control, dim=axes, correction=1, keepdim=True)
    features_std, features_mean = torch.std_mean(features, dim=axes, correction=1, keepdim=True)
    matched = (control - control_mean) * features_std / (control_std + 1e-5) + features_mean
    return functional.adaptive_avg_pool2d(matched, (features.shape[-2], features.shape[-1]))


def unet_forward(
    unet: UNetSpatioTemporalConditionModel,
    sample: Tensor,
    t: Tensor | float,
    context: Tensor,
    ids: Tensor,
    control: Tensor | None = None,
    scale: Tensor | Sequence[float] = (),
) -> Tensor:
    """diffusers' forward, step by step, with the control added to the trunk after down block 0 and not to the skips.

    sample: (B, F, 8, h, w), h and w divisible by all of the UNet's downsamplers. t: a scalar. context: (B, 1, D). ids: (B, 3).
    control: (B, F, C, h', w'), C the channels of block 0. scale: (B,), times 0.2. Returns (B, F, 4, h, w).
    """
    batch, frames = sample.shape[:2]
    times = torch.as_tensor(t, device=sample.device).reshape(1).expand(batch)
    emb = unet.time_embedding(unet.time_proj(times).to(sample.dtype))
    added = unet.add_time_proj(ids.flatten()).reshape(batch, -1)
    emb = emb + unet.add_embedding(added.to(sample.dtype))

    # batch entries are the outer dimension, frames the inner one: (B*F, ...)
    emb = emb.repeat_interleave(frames, dim=0)
    context = context.repeat_interleave(frames, dim=0)
    x = unet.conv_in(sample.flatten(0, 1))
    image_only = torch.zeros(batch, frames, dtype=x.dtype, device=x.device)

    skips = [x]
    for i, block in enumerate(unet.down_blocks):
        x, block_skips = _run(block, x, emb, context, image_only)
        skips.extend(block_skips)
        if i == 0 and control is not None:
            per_entry = torch.as_tensor(scale, dtype=x.dtype, device=x.device)
            assert per_entry.shape == (batch,), "one scale for each entry of the batch"
            per_frame = per_entry.repeat_interleave(frames)[:, None, None, None]  # (B*F, 1, 1, 1)
            x = x + CONTROL_STRENGTH * per_frame * cross_normalized(control.flatten(0, 1), x)

    x = unet.mid_block(x, temb=emb, encoder_hidden_states=context, image_only_indicator=image_only)
    for block in unet.up_blocks:
        taken = tuple(skips[-len(block.resnets) :])
        del skips[-len(block.resnets) :]
        x = _run(block, x, emb, context, image_only, res_hidden_states_tuple=taken)

    x = unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))
    return x.unflatten(0, (batch, frames))  # (B, F, 4, h, w)


def _run(block: nn.Module, x: Tensor, emb: Tensor, context: Tensor, image_only: Tensor, **skips: Any) -> Any:
    if getattr(block, "has_cross_attention", False):
        skips |= {"encoder_hidden_states": context}
    return block(hidden_states=x, temb=emb, image_only_indicator=image_only, **skips)


# The loop, section 2B.9


def guided(v: Tensor, guidance: float) -> Tensor:
    """v_u + g (v_c - v_u). v: (2, F, 4, h, w), unconditional first. Returns (1, F, 4, h, w)."""
    unconditional, conditional = v.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def denoised(x: Tensor, v: Tensor, sigma: float) -> Tensor:
    """x0 = -v s / sqrt(s^2 + 1) + x / (s^2 + 1)."""
    return -v * sigma / math.sqrt(sigma**2 + 1) + x / (sigma**2 + 1)


def euler_step(x: Tensor, v: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """x + (x - x0) / s * (s_next - s)."""
    return x + (x - denoised(x, v, sigma)) / sigma * (sigma_next - sigma)


@torch.no_grad()
def sample(
    unet: UNetSpatioTemporalConditionModel,
    control_net: nn.Module,
    poses: Tensor,
    image_latent: Tensor,
    image_embedding: Tensor,
    noise: Tensor,
    *,
    steps: int,
    guidance: float,
    batch_frames: int,
    overlap: int,
    ids: tuple[float, float, float],
    cond_scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Final latents, (1, N, 4, h, w), `dtype`; nets of another dtype are copied.

    poses: (N, 3, H, W), uint8; frame 0 is the reference's own. image_latent: (4, h, w), not scaled. image_embedding: (1, D).
    noise: (1, N, 4, h, w), unit variance. ids: fps id, motion bucket, noise strength.
    """
    unet, control_net = _in(unet, dtype), _in(control_net, dtype)
    poses = poses.to(dtype) / 255
    image_latent, image_embedding = image_latent.to(dtype), image_embedding.to(dtype)
    image_latents = torch.stack([torch.zeros_like(image_latent), image_latent])[:, None]  # (2, 1, 4, h, w)
    context = torch.stack([torch.zeros_like(image_embedding), image_embedding])  # (2, 1, D)
    both_ids = torch.tensor([ids, ids], dtype=torch.float32, device=noise.device)

    levels = sigmas(steps)
    x = noise.to(dtype) * math.sqrt(SIGMA_MAX**2 + 1)
    for i, t in enumerate(timesteps(levels)):
        sigma, sigma_next = float(levels[i]), float(levels[i + 1])
        total = torch.zeros_like(x)
        count = torch.zeros(1, x.shape[1], 1, 1, 1, dtype=dtype, device=x.device)
        for number, window in enumerate(windows(x.shape[1], batch_frames, overlap)):
            frames = list(window)
            u = x[:, frames] / math.sqrt(sigma**2 + 1)
            halves = torch.cat([torch.cat([u, u]), image_latents.expand(-1, len(frames), -1, -1, -1)], dim=2)  # (2, F, 8, h, w)
            shown = poses[[0, *frames[1:]]]  # (F, 3, H, W)
            control = control_net(torch.cat([shown, shown]), t).unflatten(0, (2, len(frames)))
            v = unet_forward(unet, halves, t, context, both_ids, control, (0.0, cond_scale))
            stepped = euler_step(x[:, frames], guided(v, guidance), sigma, sigma_next)
            dropped = 0 if number == 0 else 1
            total[:, frames[dropped:]] += stepped[:, dropped:]
            count[:, frames[dropped:]] += 1
        x = total / count
    return x


def _in(net: Net, dtype: torch.dtype) -> Net:
    # torch's `to`, as diffusers' logs a warning at every cast of this UNet
    return net if next(net.parameters()).dtype == dtype else nn.Module.to(copy.deepcopy(net), dtype)


# Before and after the loop, sections 2B.7 and 2B.10


@torch.no_grad()
def image_latent(vae: AutoencoderKLTemporalDecoder, image: Tensor, noise: Tensor) -> Tensor:
    """Posterior mean, not scaled: (4, H/8, W/8). image: (3, H, W), in [-1, 1]. noise: (3, H, W), unit variance."""
    return vae.encode((image + IMAGE_NOISE * noise)[None]).latent_dist.mean[0]


def clip_pixels(image: Tensor) -> Tensor:
    """What CLIP sees: (1, 3, 224, 224). image: (3, H, W), in [-1, 1].

    Per axis: Gaussian blur with sigma = max((factor - 1) / 2, 0.001), factor = size / 224, over max(4 sigma, 3) pixels, cut to
    an integer and made odd upwards, reflected at the edges. Then bicubic with aligned corners, CLIP's mean and deviation.
    """
    pixels = image
    for axis in (-1, -2):
        sigma = max((image.shape[axis] / 224 - 1) / 2, 0.001)
        reach = int(max(4 * sigma, 3)) // 2  # of 2 * reach + 1 pixels
        offsets = torch.arange(-reach, reach + 1, dtype=image.dtype, device=image.device)
        kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
        rows = pixels.movedim(axis, -1)
        padded = functional.pad(rows, (reach, reach), mode="reflect")
        blurred = padded.unfold(-1, len(kernel), 1) @ (kernel / kernel.sum())
        pixels = blurred.movedim(-1, axis)
    pixels = functional.interpolate(pixels[None], size=(224, 224), mode="bicubic", align_corners=True)
    mean, std = (torch.tensor(values, dtype=image.dtype, device=image.device)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return ((pixels + 1) / 2 - mean) / std


@torch.no_grad()
def decode(vae: AutoencoderKLTemporalDecoder, latents: Tensor, chunk: int) -> Tensor:
    """Frames (N, 3, H, W) in [0, 1]. latents: (1, N, 4, h, w). chunk: frames that see each other; the last may be shorter."""
    decoded = [vae.decode(part, num_frames=len(part)).sample for part in (latents[0] / LATENT_SCALE).split(chunk)]
    return (torch.cat(decoded) / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def stirred(net: Net, *, seed: int) -> Net:
    """Returns `net` itself, frozen, with noise on all parameters that are constant when built: biases, norms, blend factors.

    Otherwise some branches have no effect and all layers blend alike, so tests would show nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        if parameter.min() == parameter.max():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return net.eval().requires_grad_(False)
