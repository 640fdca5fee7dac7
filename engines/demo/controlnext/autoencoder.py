"""Trains the ControlNeXt demo's VAE on puppets: 16 pixels a latent, 16 channels, a decoder that sees two frames at a time.

The published class fixes 32 norm groups, and a norm of single channels erases plain colours: hence 64 channels at full size, and
training mostly on small crops, in bfloat16, which is twice as fast for convolutions this wide.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKLTemporalDecoder
from torch import Tensor

from engines.demo.animatediff.autoencoder import psnr, start_well
from engines.demo.controlnext.puppets import SIDE, pictures, random_moves, random_puppet, stances
from engines.demo.cpu_speed import use_channels_last, use_flat_temporal_convs
from engines.demo.sheet import write_sheet
from engines.demo.training import Schedule, device_of

SCHEDULE = Schedule(3500, 1.5e-3, hold=0.4, average=0.998)

CHANNELS = 16
"""Of the latents."""
SCALE = 16
"""Pixels a latent."""

_STAGES = ((0.7, 64, 4), (0.97, 128, 1), (1.0, SIDE, 1))
"""Until this fraction of the steps: crops of this side, so many pairs of frames."""
_KL = 3e-5
_MEAN_WEIGHT = 1e-3
_BODY_WEIGHT = 3.0


def new_vae() -> AutoencoderKLTemporalDecoder:
    """2.7 M parameters."""
    vae = AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 5,
        block_out_channels=(64, 64, 64, 64, 96),
        layers_per_block=1,
        latent_channels=CHANNELS,
        sample_size=SIDE,
    )
    start_well(vae, CHANNELS)
    use_channels_last(vae)
    use_flat_temporal_convs(vae)
    return vae


def random_crops(side: int, pairs: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """(2 N, 3, side, side) in [0, 1]: pairs of a puppet's frames, one to four apart, and (2 N, 1, ...): the puppet."""
    dice = random.Random(int(torch.randint(2**31, (), generator=rng)))
    crops, masks = [], []
    for _ in range(pairs):
        puppet, start = random_puppet(dice), dice.uniform(0, 100)
        joints = stances(puppet, random_moves(dice), (start, start + dice.randint(1, 4)))
        frames = pictures(puppet, joints)
        plain = torch.tensor([puppet.wall, puppet.ground]) / 255
        mask = (frames[:, None] - plain[:, :, None, None]).abs().amax(dim=2).amin(dim=1, keepdim=True).gt(0.02).float()
        x, y = joints[0][dice.randrange(len(joints[0]))] + [dice.gauss(0, side / 3) for _ in range(2)]
        left, top = (min(max(round(middle - side / 2), 0), SIDE - side) for middle in (x, y))
        part = (..., slice(top, top + side), slice(left, left + side))
        crops.append(frames[part])
        masks.append(mask[part])
    return torch.cat(crops), torch.cat(masks)


@dataclass
class TemporalVaeTask:
    """See `Task`."""

    name: str = "controlnext-vae"
    schedule: Schedule = SCHEDULE
    net: AutoencoderKLTemporalDecoder = field(default_factory=new_vae)

    def losses(self, step: int, rng: torch.Generator) -> Mapping[str, Tensor]:
        """L1 + squared error with the puppet weighing more, a little KL, and latents with mean 0."""
        _, side, pairs = next(stage for stage in _STAGES if step < stage[0] * self.schedule.steps)
        frames, masks = random_crops(side, pairs, rng)
        device = device_of(self.net)
        pixels, masks = (2 * frames - 1).to(device), masks.to(device)
        noise = torch.randn(len(pixels), CHANNELS, side // SCALE, side // SCALE, generator=rng).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = self.net.encode(pixels).latent_dist
            decoded = self.net.decode(posterior.mean + posterior.std * noise, num_frames=2).sample.float()
        error = decoded - pixels
        weight = 1 + (_BODY_WEIGHT - 1) * masks
        mean = posterior.mean.float()
        kl = posterior.kl().float().mean() / mean[0].numel()
        off = mean.mean(dim=(0, 2, 3)).square().mean()
        loss = (weight * (error.abs() + error.square())).mean() + _KL * kl + _MEAN_WEIGHT * off
        return {"loss": loss, "psnr": -10 * (error.detach().square().mean() / 4).log10(), "kl": kl.detach(), "mean": off.detach()}

    def sheet(self, path: Path) -> str:
        """Frames above their reconstructions."""
        frames, _ = random_crops(SIDE, 3, torch.Generator().manual_seed(1))
        posterior = self.net.encode((2 * frames - 1).to(device_of(self.net))).latent_dist
        decoded = (self.net.decode(posterior.mean, num_frames=2).sample / 2 + 0.5).clamp(0, 1).cpu()
        write_sheet(path, [frames, decoded])
        noise_share = posterior.var.mean() / (posterior.var.mean() + posterior.mean.var())
        return f"{psnr(decoded, frames):.1f} dB, posterior variance {noise_share:.3f} of the total"


@torch.no_grad()
def scale_latents(vae: AutoencoderKLTemporalDecoder, latents: Tensor) -> Tensor:
    """Fold the deviation of `latents` (N, 16, h, w) by channel into the VAE, exactly. Returns the scaled latents: times 0.18215
    they have unit variance."""
    gain = 1 / (latents.std(dim=(0, 2, 3)) * vae.config.scaling_factor)
    vae.quant_conv.weight[:CHANNELS] *= gain[:, None, None, None]
    vae.quant_conv.bias[:CHANNELS] *= gain
    vae.quant_conv.bias[CHANNELS:] += 2 * gain.log()
    vae.decoder.conv_in.weight /= gain[None, :, None, None]
    return latents * gain[:, None, None]
