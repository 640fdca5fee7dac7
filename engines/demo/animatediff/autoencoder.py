"""Trains the demo's VAE on frames of the grammar.

What decides its quality (`demo-weights.md`, section 2): two channels or more in a norm group, residual branches that are silent
at first, small crops for most of the time, a weak KL term so that the posterior is narrow, shapes weighing more than background.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D, TemporalResnetBlock
from torch import Tensor, nn

from engines.demo.animatediff.draw import images
from engines.demo.animatediff.grammar import SIDE, all_scenes
from engines.demo.sheet import write_sheet
from engines.demo.training import Schedule, device_of

SCHEDULE = Schedule(4000, 1.5e-3, hold=0.3, average=0.998)

_CROP = 32
_CROP_SHARE = 0.65  # of the steps
_KL = 3e-5
_SHAPE_WEIGHT = 4.0
_LOG_VARIANCE = -4.0  # of the posterior at first


def new_vae() -> AutoencoderKL:
    """Factor 8, 4 latent channels, 0.98 M parameters."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=SIDE,
    )
    start_well(vae, 4)
    return vae


@torch.no_grad()
def start_well(vae: Any, latent_channels: int) -> None:
    """A deep autoencoder's start, at which a signal arrives at the other end.

    Residual branches are silent, the convolutions between them keep its variance (the usual start divides it by three in each),
    and the posterior is narrow.
    """
    inner = {
        part for module in vae.modules() if isinstance(module, ResnetBlock2D | TemporalResnetBlock) for part in module.modules()
    }
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D | TemporalResnetBlock):
            nn.init.zeros_(module.conv2.weight)
        elif isinstance(module, Attention):
            nn.init.zeros_(module.to_out[0].weight)
        elif isinstance(module, nn.Conv2d) and (module not in inner or module.kernel_size == (1, 1)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    vae.quant_conv.bias[latent_channels:] = _LOG_VARIANCE


def random_frames(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """(N, 3, 64, 64) in [0, 1]: scenes at random places, and (N, 1, 64, 64): where each differs from its background."""
    scenes = all_scenes()
    chosen = [scenes[i] for i in torch.randint(len(scenes), (count,), generator=rng).tolist()]
    centres = [(x, y) for x, y in (4 + (SIDE - 8) * torch.rand(count, 2, generator=rng)).tolist()]
    scales = (0.9 + 0.2 * torch.rand(count, generator=rng)).tolist()
    frames = images(chosen, centres, scales)
    return frames, (frames - frames[:, :, :1, :1]).abs().amax(dim=1, keepdim=True).gt(0.02).float()


def crops(frames: Tensor, masks: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random 32x32 part of each."""
    places = torch.randint(SIDE - _CROP + 1, (len(frames), 2), generator=rng).tolist()
    parts = [(slice(None), slice(y, y + _CROP), slice(x, x + _CROP)) for y, x in places]
    return tuple(torch.stack([whole[part] for whole, part in zip(wholes, parts, strict=True)]) for wholes in (frames, masks))  # type: ignore[return-value]


@dataclass
class VaeTask:
    """See `Task`."""

    name: str = "animatediff-vae"
    schedule: Schedule = SCHEDULE
    net: AutoencoderKL = field(default_factory=new_vae)

    def losses(self, step: int, rng: torch.Generator) -> Mapping[str, Tensor]:
        """L1 + squared error with shapes weighing more, and a little KL."""
        if step < _CROP_SHARE * self.schedule.steps:
            frames, masks = crops(*random_frames(16, rng), rng)
        else:
            frames, masks = random_frames(8, rng)
        device = device_of(self.net)
        pixels, masks = (2 * frames - 1).to(device), masks.to(device)
        posterior = self.net.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=rng).to(device)
        error = self.net.decode(posterior.mean + posterior.std * noise).sample - pixels
        weight = 1 + (_SHAPE_WEIGHT - 1) * masks
        kl = posterior.kl().mean() / posterior.mean[0].numel()  # a value
        loss = (weight * (error.abs() + error.square())).mean() + _KL * kl
        psnr = -10 * (error.detach().square().mean() / 4).log10()
        return {"loss": loss, "psnr": psnr, "kl": kl.detach()}

    def sheet(self, path: Path) -> str:
        """Frames above their reconstructions."""
        frames, _ = random_frames(16, torch.Generator().manual_seed(1))
        posterior = self.net.encode((2 * frames - 1).to(device_of(self.net))).latent_dist
        decoded = (self.net.decode(posterior.mean).sample / 2 + 0.5).clamp(0, 1).cpu()
        write_sheet(path, [frames, decoded])
        noise_share = posterior.var.mean() / (posterior.var.mean() + posterior.mean.var())
        return f"{psnr(decoded, frames):.1f} dB, posterior variance {noise_share:.3f} of the total"


def psnr(images: Tensor, truth: Tensor) -> float:
    """In dB, of images in [0, 1]."""
    return float(-10 * (images - truth).square().mean().log10())
