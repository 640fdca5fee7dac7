"""The layers of SVD's UNet, with diffusers' weights, computed exactly but with less work.

diffusers' classes define and load the parameters; these modules take them over and compute the same function with less work.
What depends on the request becomes biases: a resnet's time projection joins the bias of its first convolution (5g), and
cross-attention over SVD's single image token is a constant that joins the bias of the self-attention before it (5a). So a call
gets two lists of vectors, one for the step and one for the guidance half, and each layer knows its indices in them, its slots.
The blend factors are constants of the weights (5g) and are folded into the temporal convolutions.
Numbers such as 5g refer to `video-models.md` section 5; the net is Stable Video Diffusion, arXiv 2311.15127, appendix D.

Letters: F frames of one clip, C channels, L = H W tokens. Images are (F, C, H, W) in channels-last memory, so that on a CPU
reading them as tokens (F, L, C), or as one image of F rows and L columns (1, C, F, L), moves no data. CUDA's GroupNorm gives
other strides.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from engines.diffusion.layers import (
    FeedForward,
    GroupNorm,
    LayerNorm,
    Slots,
    add_linear,
    as_images,
    as_tokens,
    conv_added,
    fused_qkv,
    parts_of_layers,
)
from kernels.attention import attention
from kernels.choice import exporting
from kernels.residual_blend import residual_blend
from kernels.temporal_attention import temporal_attention

Biases = Sequence[Tensor]
"""A vector (C,) for each slot."""


class BlockSlots:
    """Counters that give the layers of a net their slots, in the step's biases and in the guidance half's."""

    def __init__(self) -> None:
        self.time, self.context = Slots(), Slots()


class SpatialConvs(nn.Module):
    """diffusers' `ResnetBlock2D` as SVD uses it."""

    def __init__(self, source: Any, slot: int):
        super().__init__()
        self.norm1, self.norm2 = GroupNorm(source.norm1, silu=True), GroupNorm(source.norm2, silu=True)
        self.conv1, self.conv2 = source.conv1, source.conv2
        self.time_emb_proj, self.shortcut, self.slot = source.time_emb_proj, source.conv_shortcut, slot

    def time_biases(self, time: Tensor) -> Tensor:
        """time: (S, E) after SiLU -> (S, C'), the bias of the first convolution at each of S steps."""
        return self.time_emb_proj(time) + self.conv1.bias

    def forward(self, x: Tensor, time: Biases) -> Tensor:
        """x: (F, C, H, W) -> (F, C', H, W)."""
        bias, later = time[self.slot], self.norm2.takes_bias(x)
        h = F.conv2d(self.norm1(x), self.conv1.weight, None if later else bias, padding=1)
        return conv_added(
            self.conv2, self.norm2(h, added=bias if later else None), x if self.shortcut is None else self.shortcut(x)
        )


class TemporalConvs(nn.Module):
    """diffusers' `TemporalResnetBlock` with the blend after it: a x + (1 - a) (x + h) = x + (1 - a) h.

    Its 3x1x1 convolutions run as 3x1 ones over frames and pixels; 1 - a is folded into the second. mix: a.
    """

    def __init__(self, source: Any, mix: float, slot: int):
        super().__init__()
        self.norm1, self.norm2 = GroupNorm(source.norm1, silu=True), GroupNorm(source.norm2, silu=True)
        self.time_emb_proj, self.slot = source.time_emb_proj, slot
        assert source.conv_shortcut is None  # input and output are always equally wide
        self.conv1 = _frame_conv(source.conv1, 1.0)
        self.conv2 = _frame_conv(source.conv2, 1.0 - mix)

    def time_biases(self, time: Tensor) -> Tensor:
        """As `SpatialConvs.time_biases`."""
        return self.time_emb_proj(time) + self.conv1.bias

    def forward(self, x: Tensor, time: Biases) -> Tensor:
        """x: (F, C, H, W). GroupNorm shares statistics between the frames."""
        frames = x.shape[0]
        bias, later = time[self.slot], self.norm2.takes_bias(x, frames)
        h = F.conv2d(_rows(self.norm1(x, frames)), self.conv1.weight, None if later else bias, padding=(1, 0))
        h = self.norm2(_images(h, x), frames, bias if later else None)
        return _images(conv_added(self.conv2, _rows(h), _rows(x)), x)


class Resnet(nn.Module):
    """diffusers' `SpatioTemporalResBlock`."""

    def __init__(self, source: Any, slots: BlockSlots):
        super().__init__()
        self.spatial = SpatialConvs(source.spatial_res_block, slots.time.take())
        self.temporal = TemporalConvs(source.temporal_res_block, _mix(source.time_mixer), slots.time.take())

    def forward(self, x: Tensor, time: Biases) -> Tensor:
        """x: (F, C, H, W) -> (F, C', H, W)."""
        return self.temporal(self.spatial(x, time), time)


class SelfAttention(nn.Module):
    """Self-attention and the cross-attention to one image token that follows it, as a vector in the output bias (5a)."""

    def __init__(self, source: Any, cross: Any, slot: int):
        super().__init__()
        self.heads: int = source.heads
        self.slot = slot
        self.qkv = fused_qkv(source)
        self.out: nn.Linear = source.to_out[0]
        self.cross_v, self.cross_out = cross.to_v, cross.to_out[0]

    def context_bias(self, image_embedding: Tensor) -> Tensor:
        """image_embedding: (1, D) -> (C,). The softmax over one key is 1 for any query, so q and k are not needed."""
        return self.out.bias + self.cross_out(self.cross_v(image_embedding))[0]

    def forward(self, x: Tensor, residual: Tensor, context: Biases, over_frames: bool) -> Tensor:
        """residual + the attention of x within a frame, or within a pixel over the frames; both (F, L, C).

        residual: as in `add_linear`.
        """
        qkv = self.qkv(x)
        if over_frames:
            seen = temporal_attention(qkv, x.shape[0], self.heads)  # (F, L, C)
        else:
            query, key, value = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)  # each (F, L, heads, D)
            seen = attention(query, key, value).flatten(2)
        return add_linear(self.out, seen, residual, context[self.slot])


class SpatialBlock(nn.Module):
    """diffusers' `BasicTransformerBlock`; its norm before the cross-attention is not needed (5a)."""

    def __init__(self, source: Any, slot: int):
        super().__init__()
        self.norm1, self.attn = LayerNorm(source.norm1), SelfAttention(source.attn1, source.attn2, slot)
        self.norm3, self.ff = LayerNorm(source.norm3), FeedForward(source.ff)

    def forward(self, x: Tensor, context: Biases) -> Tensor:
        """x: (F, L, C), may be overwritten."""
        x = self.attn(self.norm1(x), x, context, over_frames=False)
        return self.ff(self.norm3(x), x)


class TemporalBlock(nn.Module):
    """diffusers' `TemporalBasicTransformerBlock` and the blend: feed-forward, self-attention over time, feed-forward."""

    mix: Tensor

    def __init__(self, source: Any, mix: float, slot: int):
        super().__init__()
        self.norm_in, self.ff_in = LayerNorm(source.norm_in), FeedForward(source.ff_in)
        self.norm1, self.attn = LayerNorm(source.norm1), SelfAttention(source.attn1, source.attn2, slot)
        self.norm3, self.ff = LayerNorm(source.norm3), FeedForward(source.ff)
        self.register_buffer("mix", source.norm1.weight.new_tensor([mix], dtype=torch.float64), persistent=False)

    def forward(self, spatial: Tensor, positions: Tensor, context: Biases) -> Tensor:
        """a x_s + (1 - a) x_t. spatial: x_s, (F, L, C). positions: (F, 1, C). Only the attention needs the frames together."""
        x = spatial + positions
        x = self.ff_in(self.norm_in(x), x)
        x = self.attn(self.norm1(x), x, context, over_frames=True)
        return residual_blend(self.ff.alone(self.norm3(x)), x, spatial, self.mix)


class Transformer(nn.Module):
    """diffusers' `TransformerSpatioTemporalModel`."""

    def __init__(self, source: Any, slots: BlockSlots):
        super().__init__()
        self.norm = GroupNorm(source.norm, silu=False)
        self.proj_in, self.proj_out = source.proj_in, source.proj_out
        self.position_proj, self.position_mlp = source.time_proj, source.time_pos_embed
        mix = _mix(source.time_mixer)
        self.spatial, self.temporal = nn.ModuleList(), nn.ModuleList()
        for spatial, temporal in zip(source.transformer_blocks, source.temporal_transformer_blocks, strict=True):
            self.spatial.append(SpatialBlock(spatial, slots.context.take()))
            self.temporal.append(TemporalBlock(temporal, mix, slots.context.take()))
        self._positions: dict[int, Tensor] = {}

    def forward(self, x: Tensor, context: Biases) -> Tensor:
        """x: (F, C, H, W)."""
        tokens = self.proj_in(as_tokens(self.norm(x)))  # (F, L, C)
        positions = self.positions(x.shape[0])  # not len(x), which would fix the number of frames of an exported graph
        for spatial, temporal in zip(self.spatial, self.temporal, strict=True):
            tokens = temporal(spatial(tokens, context), positions, context)
        return as_images(self.proj_out(tokens), x).add_(x)

    def positions(self, num_frames: int) -> Tensor:
        """(F, 1, C): the MLP of the frame's index, a constant of the weights (5g)."""
        if exporting():  # F is symbolic then, and a kept result would not be a real tensor
            return self._computed_positions(num_frames)
        if (found := self._positions.get(num_frames)) is None:
            found = self._positions[num_frames] = self._computed_positions(num_frames)
        return found

    def _computed_positions(self, num_frames: int) -> Tensor:
        weight = self.proj_in.weight
        sinusoid = self.position_proj(torch.arange(num_frames, device=weight.device)).to(weight.dtype)
        return self.position_mlp(sinusoid)[:, None]


class Layer(nn.Module):
    """A resnet, then a transformer where the level has one."""

    def __init__(self, resnet: Any, transformer: Any, slots: BlockSlots):
        super().__init__()
        self.resnet = Resnet(resnet, slots)
        self.transformer = None if transformer is None else Transformer(transformer, slots)

    @property
    def out_channels(self) -> int:
        """Channels of its output."""
        return int(self.resnet.spatial.conv2.out_channels)

    def forward(self, x: Tensor, time: Biases, context: Biases) -> Tensor:
        """x: (F, C, H, W) -> (F, C', H, W)."""
        x = self.resnet(x, time)
        return x if self.transformer is None else self.transformer(x, context)


def layers(source: Any, slots: BlockSlots) -> list[Layer]:
    """The layers of diffusers' block."""
    return [Layer(resnet, transformer, slots) for resnet, transformer in parts_of_layers(source, "attentions")]


def _mix(blender: Any) -> float:
    """The share a = sigmoid(mix_factor) of the spatial path."""
    assert blender.merge_strategy == "learned_with_images"
    assert not blender.switch_spatial_to_temporal_mix  # only the VAE's blenders have it
    return float(torch.sigmoid(blender.mix_factor.double()))


def _rows(x: Tensor) -> Tensor:
    """(F, C, H, W) -> (1, C, F, L): the video as one image with a row for each frame."""
    return x.flatten(2).permute(1, 0, 2)[None]


def _images(rows: Tensor, like: Tensor) -> Tensor:
    """(1, C, F, L) -> (F, C, H, W). like: images of that height and width."""
    return rows[0].permute(1, 0, 2).unflatten(2, like.shape[2:])


def _frame_conv(source: nn.Conv3d, scale: float) -> nn.Conv2d:
    """A 3x1x1 convolution as a 3x1 one, times `scale`."""
    conv = nn.Conv2d(source.in_channels, source.out_channels, (3, 1), padding=(1, 0), device="meta")
    weight, bias = source.weight.squeeze(-1), source.bias
    assert bias is not None
    if scale != 1.0:
        weight, bias = ((t.double() * scale).to(t.dtype) for t in (weight, bias))
    conv.weight, conv.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
    return conv
