"""SparseCtrl: residuals for the UNet from a few keyframes, computed for several steps at once and shared between requests.

The latents are not among its inputs (zeros replace them), so its output depends only on timestep, text and keyframes.
Hence several steps run in one batch, and the results are kept for the next request that differs only in its seed (5k).
Frames without a keyframe are all the same until the first motion module mixes them: up to there K + 1 columns are
computed instead of F frames (5l, 5m). SparseCtrl, arXiv 2311.16933; numbers: `video-models.md` section 5.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engines.animatediff.nets.layers import Layer, TextContext, layers, text_context, time_embedding
from engines.animatediff.nets.unet import Residuals
from engines.diffusion.layers import DownBlock, MidBlock, Slots


class SparseControl(nn.Module):
    """source: a loaded `diffusers.SparseControlNetModel`, whose parameters it takes over."""

    def __init__(self, source: Any):
        super().__init__()
        self.time_proj, self.time_mlp = source.time_proj, source.time_embedding
        self.conv_in = source.conv_in
        self.condition_embedding = source.controlnet_cond_embedding
        slots = Slots()
        self.down = nn.ModuleList(DownBlock(layers(block, slots), block) for block in source.down_blocks)
        self.mid = MidBlock(layers(source.mid_block, slots))
        self.skip_convs, self.mid_conv = source.controlnet_down_blocks, source.controlnet_mid_block
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it

    def text_context(self, text: Tensor) -> TextContext:
        """What `forward` needs of the text (G, 77, D), computed once a request (5n)."""
        return text_context(self, text)

    def columns(self, control: Tensor) -> Tensor:
        """(K + 1, C, h, w): the embedded keyframes, and last the embedding of a frame without one (5l).

        control: (K, 3, H, W) or (K, 4, h, w). A frame without a keyframe is a zero image with a zero mask. conv_in's input is
        zeros in place of latents, so only its bias is left.
        """
        condition = control.new_zeros(control.shape[0] + 1, control.shape[1] + 1, *control.shape[2:])
        condition[:-1, :-1] = control
        condition[:-1, -1] = 1.0
        embedded: Tensor = self.condition_embedding(condition.contiguous(memory_format=torch.channels_last))
        return embedded + self.conv_in.bias[:, None, None]

    def forward(
        self, columns: Tensor, frames: Sequence[int], num_frames: int, timesteps: Sequence[int], context: TextContext
    ) -> list[Residuals]:
        """The residuals of S timesteps in one batch.

        columns: from `columns`. frames: the keyframes' K indices. context: from `text_context`, for G halves.
        Returns S `Residuals` for G F images each.
        """
        steps, halves = len(timesteps), context[0][0].shape[0]
        time = time_embedding(self.time_proj, self.time_mlp, timesteps, self.conv_in.weight)  # (S, E)
        context = [(key.repeat(steps, 1, 1, 1), value.repeat(steps, 1, 1, 1)) for key, value in context]  # (S G, ...)
        column_of_frame = torch.full((num_frames,), len(frames), device=columns.device)
        column_of_frame[list(frames)] = torch.arange(len(frames), device=columns.device)

        def spread(x: Tensor) -> Tensor:
            """(S G (K + 1), C, h, w) -> (S G F, C, h, w)."""
            images = x.unflatten(0, (-1, columns.shape[0])).index_select(1, column_of_frame).flatten(0, 1)
            return images.contiguous(memory_format=torch.channels_last)

        first: DownBlock = self.down[0]  # type: ignore[assignment]
        entered: Layer = first.layers[0]  # type: ignore[assignment]
        assert entered.motion is not None  # the adapter has one in every layer
        x = entered.images(columns.repeat(steps * halves, 1, 1, 1), time, context)  # still K + 1 columns (5m)
        x = entered.motion(spread(x), num_frames)
        skips = [x, *first(x, time, context, num_frames, first_layer=1)]
        for block in self.down[1:]:
            skips += block(skips[-1], time, context, num_frames)
        mid = self.mid_conv(self.mid(skips[-1], time, context, num_frames))
        entry = spread(self.skip_convs[0](columns)).repeat(steps * halves, 1, 1, 1)  # independent of step and text
        residuals = [entry, *(conv(skip) for conv, skip in zip(self.skip_convs[1:], skips, strict=True))]
        by_step = zip(*(residual.chunk(steps) for residual in (*residuals, mid)), strict=True)
        return [Residuals(skips=tuple(skips), mid=mid) for *skips, mid in by_step]


class ResidualCache:
    """Stores residuals by what they depend on. If they exceed `budget_bytes`, the least recently used are dropped first."""

    def __init__(self, budget_bytes: int):
        self.budget_bytes = budget_bytes
        self.size_bytes = 0
        self._entries: OrderedDict[Hashable, list[Residuals]] = OrderedDict()

    def get(self, key: Hashable) -> list[Residuals] | None:
        """What was put under `key`, if it is still there."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: Hashable, residuals: list[Residuals]) -> None:
        """Keep `residuals`, unless they alone exceed the budget."""
        size = sum(r.size_bytes for r in residuals)
        if size > self.budget_bytes or key in self._entries:
            return
        self._entries[key] = residuals
        self.size_bytes += size
        while self.size_bytes > self.budget_bytes:
            _, dropped = self._entries.popitem(last=False)
            self.size_bytes -= sum(r.size_bytes for r in dropped)
