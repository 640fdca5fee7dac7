"""The layers of the motion UNet and of SparseCtrl, with diffusers' weights, computed exactly but with less work.

diffusers' classes define and load the parameters; these modules take them over and compute the same function with less work:
one GEMM for q, k and v; text keys and values once a request for all frames (5n); the position table folded into a bias
of q, k and v (5p). Numbers such as 5n refer to `video-models.md` section 5.

Letters: G guidance halves, S steps, F frames, N = images in a batch (G F or S G F), C channels, L = H W tokens.
Images are (N, C, H, W) in channels-last memory, so that reading them as tokens (N, L, C) moves no data.
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
    linear,
    parts_of_layers,
)
from kernels.attention import attention
from kernels.temporal_attention import temporal_attention

KeyValue = tuple[Tensor, Tensor]
TextContext = Sequence[KeyValue]
"""Keys and values of the text for every cross-attention of a net, in order: each (G, 77, heads, D)."""


class SelfAttention(nn.Module):
    """Attention within a frame."""

    def __init__(self, source: Any):
        super().__init__()
        self.heads: int = source.heads
        self.qkv, self.out = fused_qkv(source), source.to_out[0]

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + the attention of x, both (N, L, C). residual: as in `add_linear`."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # each (N, L, heads, D)
        return add_linear(self.out, attention(query, key, value).flatten(2), residual)


class TemporalAttention(nn.Module):
    """Attention of a pixel over the frames. position: (1, P, C), a row for each frame, added to the input of q, k and v."""

    position: Tensor

    def __init__(self, source: Any, position: Tensor):
        super().__init__()
        self.heads: int = source.heads
        self.qkv, self.out = fused_qkv(source), source.to_out[0]
        # W (x + p) = W x + W p: the table becomes a bias of each frame's q, k and v, so adding it needs no separate pass (5p)
        self.register_buffer("position", self.qkv(position)[0], persistent=False)  # (P, 3 C)

    def forward(self, x: Tensor, residual: Tensor, num_frames: int) -> Tensor:
        """residual + the attention of x, both (B F, L, C). residual: as in `add_linear`."""
        return add_linear(self.out, temporal_attention(self.qkv(x), num_frames, self.heads, self.position), residual)


class CrossAttention(nn.Module):
    """Attention of images to the text. slot: the index of its keys and values in a `TextContext`."""

    def __init__(self, source: Any, slot: int):
        super().__init__()
        self.heads: int = source.heads
        self.slot = slot
        self.to_q, self.to_k, self.to_v, self.out = source.to_q, source.to_k, source.to_v, source.to_out[0]

    def keys_values(self, text: Tensor) -> KeyValue:
        """The keys and values of text (G, 77, D_text). They depend on nothing else, so once a request is enough (5n)."""
        key, value = (proj(text).unflatten(-1, (self.heads, -1)) for proj in (self.to_k, self.to_v))
        return key, value

    def forward(self, x: Tensor, residual: Tensor, context: TextContext) -> Tensor:
        """residual + the attention of x, both (N, L, C). residual: as in `add_linear`.

        The frames of a half are one long query sequence over shared keys and values (5n).
        """
        key, value = context[self.slot]  # (B, 77, heads, D)
        query = self.to_q(x).reshape(key.shape[0], -1, *key.shape[2:])  # (B, N L / B, heads, D)
        return add_linear(self.out, attention(query, key, value).reshape(x.shape), residual)


class SpatialBlock(nn.Module):
    """Self-attention within a frame, cross-attention to the text, feed-forward."""

    def __init__(self, source: Any, slot: int):
        super().__init__()
        self.norm1, self.attn1 = LayerNorm(source.norm1), SelfAttention(source.attn1)
        self.norm2, self.attn2 = LayerNorm(source.norm2), CrossAttention(source.attn2, slot)
        self.norm3, self.ff = LayerNorm(source.norm3), FeedForward(source.ff)

    def forward(self, x: Tensor, context: TextContext) -> Tensor:
        """x: (N, L, C), may be overwritten."""
        x = self.attn1(self.norm1(x), x)
        x = self.attn2(self.norm2(x), x, context)
        return self.ff(self.norm3(x), x)


class SpatialTransformer(nn.Module):
    """diffusers' `Transformer2DModel`: GroupNorm, projection, blocks, projection, residual."""

    def __init__(self, source: Any, slots: Slots):
        super().__init__()
        self.norm = GroupNorm(source.norm, silu=False)
        self.proj_in, self.proj_out = _as_linear(source.proj_in), _as_linear(source.proj_out)
        self.blocks = nn.ModuleList(SpatialBlock(block, slots.take()) for block in source.transformer_blocks)

    def forward(self, x: Tensor, context: TextContext) -> Tensor:
        """x: (N, C, H, W)."""
        tokens = self.proj_in(as_tokens(self.norm(x)))  # (N, L, C)
        for block in self.blocks:
            tokens = block(tokens, context)
        return as_images(self.proj_out(tokens), x).add_(x)


class MotionBlock(nn.Module):
    """One (SparseCtrl) or two (UNet) self-attentions over time, feed-forward."""

    def __init__(self, source: Any):
        super().__init__()
        position = source.pos_embed.pe
        self.norm1, self.attn1 = LayerNorm(source.norm1), TemporalAttention(source.attn1, position)
        self.norm2 = None if source.attn2 is None else LayerNorm(source.norm2)
        self.attn2 = None if source.attn2 is None else TemporalAttention(source.attn2, position)
        self.norm3, self.ff = LayerNorm(source.norm3), FeedForward(source.ff)

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        """x: (B F, L, C), may be overwritten. Only the attentions need all frames of a clip together."""
        x = self.attn1(self.norm1(x), x, num_frames)
        if self.attn2 is not None and self.norm2 is not None:
            x = self.attn2(self.norm2(x), x, num_frames)
        return self.ff(self.norm3(x), x)


class MotionModule(nn.Module):
    """diffusers' `AnimateDiffTransformer3D`. Its GroupNorm shares statistics between the frames of a clip.

    AnimateDiff, arXiv 2307.04725, section 4.2.
    """

    def __init__(self, source: Any):
        super().__init__()
        self.norm = GroupNorm(source.norm, silu=False)
        self.proj_in, self.proj_out = source.proj_in, source.proj_out
        self.blocks = nn.ModuleList(MotionBlock(block) for block in source.transformer_blocks)

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        """x: (B F, C, H, W)."""
        tokens = self.proj_in(as_tokens(self.norm(x, num_frames)))  # (B F, L, C)
        for block in self.blocks:
            tokens = block(tokens, num_frames)
        return as_images(self.proj_out(tokens), x).add_(x)


class Resnet(nn.Module):
    """diffusers' `ResnetBlock2D` in the variant of SD 1.5."""

    def __init__(self, source: Any):
        super().__init__()
        self.norm1, self.norm2 = GroupNorm(source.norm1, silu=True), GroupNorm(source.norm2, silu=True)
        self.conv1, self.conv2 = source.conv1, source.conv2
        self.time_emb_proj, self.shortcut = source.time_emb_proj, source.conv_shortcut

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x: (N, C, H, W). time: (T, E) after SiLU, each row for N / T consecutive images."""
        bias = self.time_emb_proj(time) + self.conv1.bias  # (T, C')
        h = self.norm1(x)
        later = None
        if len(bias) == 1:  # one step: its time becomes a bias of the convolution, without a separate pass
            later = bias[0] if self.norm2.takes_bias(x) else None
            h = F.conv2d(h, self.conv1.weight, None if later is not None else bias[0], padding=1)
        else:
            h = F.conv2d(h, self.conv1.weight, padding=1)
            h += bias.repeat_interleave(x.shape[0] // bias.shape[0], dim=0)[:, :, None, None]
        return conv_added(self.conv2, self.norm2(h, added=later), x if self.shortcut is None else self.shortcut(x))


class Layer(nn.Module):
    """A resnet, then attention and a motion module if the level has them."""

    def __init__(self, resnet: Any, attention: Any, motion: Any, slots: Slots):
        super().__init__()
        self.resnet = Resnet(resnet)
        self.attention = None if attention is None else SpatialTransformer(attention, slots)
        self.motion = None if motion is None else MotionModule(motion)

    @property
    def out_channels(self) -> int:
        """Channels of its output."""
        return int(self.resnet.conv2.out_channels)

    def forward(self, x: Tensor, time: Tensor, context: TextContext, num_frames: int) -> Tensor:
        """x: (N, C, H, W) -> (N, C', H, W)."""
        x = self.images(x, time, context)
        return x if self.motion is None else self.motion(x, num_frames)

    def images(self, x: Tensor, time: Tensor, context: TextContext) -> Tensor:
        """The part that processes each frame independently, which is all but the motion module."""
        x = self.resnet(x, time)
        return x if self.attention is None else self.attention(x, context)


def layers(source: Any, slots: Slots) -> list[Layer]:
    """The layers of diffusers' block. slots: numbers the net's cross-attentions."""
    return [
        Layer(resnet, attn, motion, slots) for resnet, attn, motion in parts_of_layers(source, "attentions", "motion_modules")
    ]


def text_context(net: nn.Module, text: Tensor) -> list[KeyValue]:
    """The keys and values of `text` (G, 77, D_text) for every cross-attention of `net`."""
    attentions = sorted((m for m in net.modules() if isinstance(m, CrossAttention)), key=lambda m: m.slot)
    return [attn.keys_values(text) for attn in attentions]


def time_embedding(proj: nn.Module, mlp: nn.Module, timesteps: Sequence[int], like: Tensor) -> Tensor:
    """(T, E): embedding of T timesteps, after the SiLU that every resnet would apply first, computed once for all resnets."""
    sinusoid: Tensor = proj(torch.tensor(timesteps, device=like.device))  # fp32 whatever the model's dtype
    return F.silu(mlp(sinusoid.to(like.dtype)))


def _as_linear(projection: nn.Module) -> nn.Linear:
    """A 1x1 convolution (SD 1.5) or a linear layer, as a linear layer."""
    if isinstance(projection, nn.Linear):
        return projection
    assert isinstance(projection, nn.Conv2d)
    return linear(projection.weight.flatten(1), projection.bias)
