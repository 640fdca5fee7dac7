"""The motion UNet: SD 1.5's UNet with AnimateDiff's motion modules, one call a step.

It runs `layers` in the order of diffusers' `UNetMotionModel.forward`; a test compares the two.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engines.animatediff.nets.layers import TextContext, layers, text_context, time_embedding
from engines.diffusion.layers import DownBlock, GroupNorm, MidBlock, Slots, UpBlock


@dataclass(frozen=True)
class Residuals:
    """What SparseCtrl adds to a UNet call: to each skip tensor, and to the middle block's output; each (G F, C, h, w)."""

    skips: tuple[Tensor, ...]
    mid: Tensor

    @property
    def size_bytes(self) -> int:
        """Memory held."""
        return sum(t.numel() * t.element_size() for t in (*self.skips, self.mid))


class MotionUNet(nn.Module):
    """source: a loaded `diffusers.UNetMotionModel`, whose parameters it takes over."""

    def __init__(self, source: Any):
        super().__init__()
        self.time_proj, self.time_mlp = source.time_proj, source.time_embedding
        self.conv_in = source.conv_in
        slots = Slots()
        self.down = nn.ModuleList(DownBlock(layers(block, slots), block) for block in source.down_blocks)
        self.mid = MidBlock(layers(source.mid_block, slots))
        self.up = nn.ModuleList(UpBlock(layers(block, slots), block) for block in source.up_blocks)
        self.norm_out, self.conv_out = GroupNorm(source.conv_norm_out, silu=True), source.conv_out
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it

    def text_context(self, text: Tensor) -> TextContext:
        """What `forward` needs of the text (G, 77, D), computed once a request (5n)."""
        return text_context(self, text)

    def time_embeddings(self, timesteps: Sequence[int]) -> Tensor:
        """(S, E): a row for each timestep, computed once a request."""
        return time_embedding(self.time_proj, self.time_mlp, timesteps, self.conv_in.weight)

    def forward(self, latents: Tensor, time: Tensor, context: TextContext, residuals: Residuals | None = None) -> Tensor:
        """latents: (G, 4, F, h, w). time: (1, E), one row of `time_embeddings`. Returns (G, 4, F, h, w)."""
        num_frames = latents.shape[2]
        x = latents.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)  # (G F, 4, h, w)
        x = self.conv_in(x)
        skips = [x]
        for block in self.down:
            skips += block(skips[-1], time, context, num_frames)
        x = self.mid(skips[-1], time, context, num_frames)
        if residuals is not None:
            skips = [skip + residual for skip, residual in zip(skips, residuals.skips, strict=True)]
            x = x + residuals.mid
        for block in self.up:
            x = block(x, skips, time, context, num_frames)
        x = self.conv_out(self.norm_out(x))
        return x.unflatten(0, (-1, num_frames)).transpose(1, 2)
