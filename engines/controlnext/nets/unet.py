"""SVD's UNet with ControlNeXt's injection: one call is one window in one guidance half at one step.

It runs `layers` in the order of diffusers' `UNetSpatioTemporalConditionModel.forward`; a test compares the two.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from engines.controlnext.nets.control_net import frame_statistics
from engines.controlnext.nets.layers import Biases, BlockSlots, SelfAttention, SpatialConvs, TemporalConvs, layers
from engines.diffusion.layers import DownBlock, GroupNorm, MidBlock, UpBlock

INJECTION = 0.2
"""Strength of the control, set by hand in the published code."""


@dataclass(frozen=True)
class Control:
    """What is injected. maps: (F, C, h, w), of `ControlNet.finish`, normalised and pooled. scale: 1 is as published."""

    maps: Tensor
    scale: float


@dataclass(frozen=True)
class Half:
    """One guidance half of a request. image: (1, C, h, w), the image's part of conv_in, bias included (5f)."""

    image: Tensor
    context: Biases


class SVDUNet(nn.Module):
    """source: a loaded `diffusers.UNetSpatioTemporalConditionModel`, whose parameters it takes over."""

    def __init__(self, source: Any):
        super().__init__()
        self.time_proj, self.time_mlp = source.time_proj, source.time_embedding
        self.ids_proj, self.ids_mlp = source.add_time_proj, source.add_embedding
        self.conv_in = source.conv_in
        self.latent_channels: int = source.conv_out.out_channels
        slots = BlockSlots()
        self.down = nn.ModuleList(DownBlock(layers(block, slots), block) for block in source.down_blocks)
        self.mid = MidBlock(layers(source.mid_block, slots))
        self.up = nn.ModuleList(UpBlock(layers(block, slots), block) for block in source.up_blocks)
        self.norm_out, self.conv_out = GroupNorm(source.conv_norm_out, silu=True), source.conv_out
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it

    def guidance_half(self, image_latent: Tensor, image_embedding: Tensor) -> Half:
        """What `forward` needs of one guidance half, computed once a request. For the unconditional half, pass zeros.

        image_latent: (4, h, w). image_embedding: (1, D).
        """
        weight = self.conv_in.weight[:, self.latent_channels :]
        image = F.conv2d(image_latent.to(weight)[None], weight, self.conv_in.bias, padding=1)
        attentions = sorted((m for m in self.modules() if isinstance(m, SelfAttention)), key=lambda m: m.slot)
        return Half(image, [attn.context_bias(image_embedding.to(weight)) for attn in attentions])

    def time_biases(self, times: Sequence[float], added_ids: Sequence[float]) -> list[Biases]:
        """What `forward` needs at each step, computed once a request (5g): every resnet's time projection at every step.

        times: 0.25 ln sigma of S steps. added_ids: (fps id, motion bucket, noise strength), in fp32 like the rest of the
        embedding: bf16 would round a strength of 0.02 by 0.1 %.
        """
        like = self.conv_in.weight
        time = self.time_mlp(self.time_proj(torch.tensor(times, device=like.device)).to(like.dtype))  # (S, E)
        ids = self.ids_proj(torch.tensor(added_ids, device=like.device)).to(like.dtype).flatten()
        active = F.silu(time + self.ids_mlp(ids[None]))
        convs = sorted((m for m in self.modules() if isinstance(m, (SpatialConvs, TemporalConvs))), key=lambda m: m.slot)
        by_slot = [conv.time_biases(active) for conv in convs]  # each (S, C)
        return [[biases[i] for biases in by_slot] for i in range(len(times))]

    def forward(self, latents: Tensor, half: Half, time: Biases, control: Control | None = None) -> Tensor:
        """latents: (F, 4, h, w), scaled for the model. time: one of `time_biases`. Returns v, (F, 4, h, w)."""
        x = latents.contiguous(memory_format=torch.channels_last)
        x = F.conv2d(x, self.conv_in.weight[:, : self.latent_channels], padding=1) + half.image
        skips = [x]
        for i, block in enumerate(self.down):
            outputs = block(x, time, half.context)
            skips += outputs
            x = outputs[-1]
            if i == 0 and control is not None:
                x = inject(x, control)  # into the trunk only: the skip stays as it was
        x = self.mid(x, time, half.context)
        for block in self.up:
            x = block(x, skips, time, half.context)
        return self.conv_out(self.norm_out(x))


def inject(x: Tensor, control: Control) -> Tensor:
    """Cross normalisation: the control is given each frame's mean and deviation before it is added. x: (F, C, h, w).

    ControlNeXt, arXiv 2408.06070, section 3.3. `maps` are already normalised by their own statistics (5e).
    """
    std, mean = frame_statistics(x)
    return x + (INJECTION * control.scale) * (control.maps * std.to(x.dtype) + mean.to(x.dtype))
