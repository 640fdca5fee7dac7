"""The layers of the motion UNet and of SparseCtrl, over diffusers' weights, in the form that saves work exactly.

diffusers' classes define and load the parameters; these modules take them over and compute the same function with less:
one GEMM for q, k and v; text keys and values once a request for all frames (5n); the position table folded into a bias
of q, k and v (5p). Numbers refer to `video-models.md` section 5.

Letters: G guidance halves, S steps, F frames, N = images in a batch (G F or S G F), C channels, L = H W tokens.
Images are (N, C, H, W) in channels-last memory, so that reading them as tokens (N, L, C) moves no data.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from engines.layers import Slots, fused_qkv, linear
from kernels.attention import attention

KeyValue = tuple[Tensor, Tensor]
TextContext = Sequence[KeyValue]
"""Keys and values of the text for every cross-attention of a net, in order: each (G, heads, 77, D)."""


class SelfAttention(nn.Module):
    """Attention within a sequence. position: (1, P, C) table that is added to the input of q, k and v, or None."""

    position: Tensor | None

    def __init__(self, source: Any, position: Tensor | None = None):
        super().__init__()
        self.heads: int = source.heads
        self.out: nn.Module = source.to_out[0]
        self.qkv = fused_qkv(source)
        # W (x + p) = W x + W p: the table becomes a bias per position, and adding it no pass of its own (5p)
        self.register_buffer("position", None if position is None else self.qkv(position), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, C) -> (B, N, C)."""
        qkv = self.qkv(x)
        if self.position is not None:
            qkv = qkv + self.position[:, : x.shape[1]]
        query, key, value = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, N, D)
        return self.out(attention(query, key, value).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention of images to the text. slot: where its keys and values stand in a `TextContext`."""

    def __init__(self, source: Any, slot: int):
        super().__init__()
        self.heads: int = source.heads
        self.slot = slot
        self.to_q, self.to_k, self.to_v, self.out = source.to_q, source.to_k, source.to_v, source.to_out[0]

    def keys_values(self, text: Tensor) -> KeyValue:
        """text: (G, 77, D_text). They depend on nothing else, so once a request is enough (5n)."""
        key, value = (proj(text).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.to_k, self.to_v))
        return key, value

    def forward(self, x: Tensor, context: TextContext) -> Tensor:
        """x: (N, L, C). The frames of a half are one long query sequence over shared keys and values (5n)."""
        key, value = context[self.slot]  # (B, heads, 77, D)
        query = self.to_q(x).reshape(key.shape[0], -1, self.heads, key.shape[-1]).transpose(1, 2)  # (B, heads, N L / B, D)
        return self.out(attention(query, key, value).transpose(1, 2).reshape(x.shape))


class SpatialBlock(nn.Module):
    """Self-attention within a frame, cross-attention to the text, feed-forward."""

    def __init__(self, source: Any, slot: int):
        super().__init__()
        self.norm1, self.norm2, self.norm3, self.ff = source.norm1, source.norm2, source.norm3, source.ff
        self.attn1, self.attn2 = SelfAttention(source.attn1), CrossAttention(source.attn2, slot)

    def forward(self, x: Tensor, context: TextContext) -> Tensor:
        """x: (N, L, C)."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """diffusers' `Transformer2DModel`: GroupNorm, projection, blocks, projection, residual."""

    def __init__(self, source: Any, first_slot: int):
        super().__init__()
        self.norm = source.norm
        self.proj_in, self.proj_out = _as_linear(source.proj_in), _as_linear(source.proj_out)
        self.blocks = nn.ModuleList(SpatialBlock(block, first_slot + i) for i, block in enumerate(source.transformer_blocks))

    def forward(self, x: Tensor, context: TextContext) -> Tensor:
        """x: (N, C, H, W)."""
        tokens = self.proj_in(self.norm(x).permute(0, 2, 3, 1).flatten(1, 2))  # (N, L, C)
        for block in self.blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(tokens).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class MotionBlock(nn.Module):
    """One (SparseCtrl) or two (UNet) self-attentions over time, feed-forward."""

    def __init__(self, source: Any):
        super().__init__()
        position = source.pos_embed.pe
        self.norm1, self.attn1 = source.norm1, SelfAttention(source.attn1, position)
        self.norm2 = source.norm2
        self.attn2 = None if source.attn2 is None else SelfAttention(source.attn2, position)
        self.norm3, self.ff = source.norm3, source.ff

    def forward(self, x: Tensor) -> Tensor:
        """x: (B L, F, C)."""
        x = x + self.attn1(self.norm1(x))
        if self.attn2 is not None:
            x = x + self.attn2(self.norm2(x))
        return x + self.ff(self.norm3(x))


class MotionModule(nn.Module):
    """diffusers' `AnimateDiffTransformer3D`. Its GroupNorm shares statistics between the frames of a clip.

    AnimateDiff, arXiv 2307.04725, section 4.2.
    """

    def __init__(self, source: Any):
        super().__init__()
        self.norm, self.proj_in, self.proj_out = source.norm, source.proj_in, source.proj_out
        self.blocks = nn.ModuleList(MotionBlock(block) for block in source.transformer_blocks)

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        """x: (B F, C, H, W)."""
        clip = x.unflatten(0, (-1, num_frames)).transpose(1, 2)  # (B, C, F, H, W)
        b, c, f, h, w = clip.shape
        tokens = self.proj_in(self.norm(clip).permute(0, 3, 4, 2, 1).reshape(b * h * w, f, c))
        for block in self.blocks:
            tokens = block(tokens)
        return x + self.proj_out(tokens).reshape(b, h, w, f, c).permute(0, 3, 4, 1, 2).flatten(0, 1)


class Resnet(nn.Module):
    """diffusers' `ResnetBlock2D` in the variant of SD 1.5."""

    def __init__(self, source: Any):
        super().__init__()
        self.norm1, self.conv1, self.norm2, self.conv2 = source.norm1, source.conv1, source.norm2, source.conv2
        self.time_emb_proj, self.shortcut = source.time_emb_proj, source.conv_shortcut

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x: (N, C, H, W). time: (T, E) after SiLU, each row for N / T consecutive images."""
        bias = self.time_emb_proj(time)  # (T, C')
        bias = bias.repeat_interleave(x.shape[0] // bias.shape[0], dim=0)[:, :, None, None]
        h = self.conv1(F.silu(self.norm1(x))) + bias
        h = self.conv2(F.silu(self.norm2(h)))
        return (x if self.shortcut is None else self.shortcut(x)) + h


class DownBlock(nn.Module):
    """Resnets, each followed by attention (where the level has it) and motion; then half the size."""

    def __init__(self, source: Any, first_slot: int):
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(resnet) for resnet in source.resnets)
        self.attentions = _transformers(source, first_slot)
        self.motions = nn.ModuleList(MotionModule(module) for module in source.motion_modules)
        self.downsampler = source.downsamplers[0] if source.downsamplers else None

    def forward(self, x: Tensor, time: Tensor, context: TextContext, num_frames: int, first_layer: int = 0) -> list[Tensor]:
        """x: (N, C, H, W) -> the skip tensors, the last of them the output. first_layer: where x enters."""
        skips = []
        for i in range(first_layer, len(self.resnets)):
            x = self.images(i, x, time, context)
            x = self.motions[i](x, num_frames)
            skips.append(x)
        if self.downsampler is not None:
            skips.append(self.downsampler(x))
        return skips

    def images(self, i: int, x: Tensor, time: Tensor, context: TextContext) -> Tensor:
        """The part of layer i that sees each frame by itself."""
        x = self.resnets[i](x, time)
        return self.attentions[i](x, context) if len(self.attentions) else x


class MidBlock(nn.Module):
    """Resnet, then attention, motion (in the UNet, where the adapter has it) and resnet."""

    def __init__(self, source: Any, first_slot: int):
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(resnet) for resnet in source.resnets)
        self.attentions = _transformers(source, first_slot)
        self.motions = nn.ModuleList(MotionModule(module) for module in getattr(source, "motion_modules", ()))

    def forward(self, x: Tensor, time: Tensor, context: TextContext, num_frames: int) -> Tensor:
        """x: (N, C, H, W)."""
        x = self.resnets[0](x, time)
        for i, attn in enumerate(self.attentions):
            x = attn(x, context)
            if len(self.motions):
                x = self.motions[i](x, num_frames)
            x = self.resnets[i + 1](x, time)
        return x


class UpBlock(nn.Module):
    """Resnets over the concatenated skips, attention, motion; then twice the size."""

    def __init__(self, source: Any, first_slot: int):
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(resnet) for resnet in source.resnets)
        self.attentions = _transformers(source, first_slot)
        self.motions = nn.ModuleList(MotionModule(module) for module in source.motion_modules)
        self.upsample_conv = source.upsamplers[0].conv if source.upsamplers else None

    def forward(self, x: Tensor, skips: list[Tensor], time: Tensor, context: TextContext, num_frames: int) -> Tensor:
        """x: (N, C, H, W). skips: consumed from the end."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), time)
            if len(self.attentions):
                x = self.attentions[i](x, context)
            x = self.motions[i](x, num_frames)
        if self.upsample_conv is not None:
            x = self.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


def take_slots(slots: Slots, block: Any) -> int:
    """The number of the block's first cross-attention."""
    return slots.take(sum(len(transformer.transformer_blocks) for transformer in getattr(block, "attentions", ())))


def text_context(net: nn.Module, text: Tensor) -> list[KeyValue]:
    """The keys and values of `text` (G, 77, D_text) for every cross-attention of `net`."""
    attentions = sorted((m for m in net.modules() if isinstance(m, CrossAttention)), key=lambda m: m.slot)
    return [attn.keys_values(text) for attn in attentions]


def time_embedding(proj: nn.Module, mlp: nn.Module, timesteps: Sequence[int], like: Tensor) -> Tensor:
    """(T, E) embedding of T timesteps after the SiLU that every resnet begins with, once for all of them."""
    sinusoid: Tensor = proj(torch.tensor(timesteps, device=like.device))  # fp32 whatever the model's dtype
    return F.silu(mlp(sinusoid.to(like.dtype)))


def _transformers(source: Any, first_slot: int) -> nn.ModuleList:
    modules, slot = nn.ModuleList(), first_slot
    for transformer in getattr(source, "attentions", ()):
        modules.append(SpatialTransformer(transformer, slot))
        slot += len(transformer.transformer_blocks)
    return modules


def _as_linear(projection: nn.Module) -> nn.Linear:
    """A 1x1 convolution (SD 1.5) or a linear layer, as the latter."""
    if isinstance(projection, nn.Linear):
        return projection
    assert isinstance(projection, nn.Conv2d)
    return linear(projection.weight.flatten(1), projection.bias)
