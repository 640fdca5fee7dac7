"""Layers that both models' UNets share; they compute with diffusers' parameters in fewer, larger operations.

A block runs its layers in turn. Each model defines its own layer: a resnet and what follows it at that level. What layers need
besides the images (times, contexts, the number of frames) differs between the models, so a block only passes it on.
"""

from collections.abc import Iterable, Iterator
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from kernels.geglu import geglu
from kernels.group_norm_silu import group_norm_silu, norms_by_kernel
from kernels.layer_norm import layer_norm
from kernels.residual_blend import adds_by_kernel, residual_add


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer that holds these parameters. weight: (out, in)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def fused_qkv(source: Any) -> nn.Linear:
    """The three projections of a self-attention (diffusers' `Attention`) as one GEMM, (..., C) -> (..., 3 C)."""
    return linear(torch.cat([source.to_q.weight, source.to_k.weight, source.to_v.weight]), None)


def as_tokens(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, L, C); a view of images in channels-last memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def as_images(tokens: Tensor, like: Tensor) -> Tensor:
    """(N, L, C) -> (N, C, H, W), a view. like: images of that height and width."""
    return tokens.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


class GroupNorm(nn.Module):
    """diffusers' GroupNorm. silu: whether a SiLU follows it, which is then computed here."""

    def __init__(self, source: Any, silu: bool):
        super().__init__()
        self.weight, self.bias = source.weight, source.bias
        self.num_groups, self.eps, self.silu = source.num_groups, source.eps, silu

    def forward(self, x: Tensor, num_frames: int = 1, added: Tensor | None = None) -> Tensor:
        """x: (B F, C, H, W). num_frames: how many consecutive images share statistics. added: (C,), added to x first."""
        shared = (self.weight, self.bias, self.num_groups, self.eps)
        return group_norm_silu(x, *shared, num_frames=num_frames, silu=self.silu, added=added)

    def takes_bias(self, x: Tensor, num_frames: int = 1) -> bool:
        """Whether it should add the bias of the convolution before it. x: images of the same size, any channels."""
        like = x[:1, :1].expand(-1, len(self.weight), -1, -1)
        return norms_by_kernel(like, self.num_groups, num_frames, self.silu)


class LayerNorm(nn.Module):
    """diffusers' LayerNorm."""

    def __init__(self, source: Any):
        super().__init__()
        self.weight, self.bias, self.eps = source.weight, source.bias, source.eps

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., C)."""
        return layer_norm(x, self.weight, self.bias, self.eps)


class FeedForward(nn.Module):
    """diffusers' `FeedForward` with GEGLU."""

    def __init__(self, source: Any):
        super().__init__()
        gate, _, out = source.net
        self.proj: nn.Linear = gate.proj
        self.out: nn.Linear = out

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + the feed-forward of x, both (..., C). residual: as in `add_linear`."""
        return add_linear(self.out, geglu(self.proj(x)), residual)

    def alone(self, x: Tensor) -> Tensor:
        """The feed-forward of x, for a residual that is added elsewhere."""
        return self.out(geglu(self.proj(x)))


def add_linear(layer: nn.Linear, x: Tensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
    """residual + layer(x). residual: (..., C), contiguous; the sum may overwrite it.

    bias: used instead of the layer's. Adding the product in place saves one pass over the residual.
    """
    bias = layer.bias if bias is None else bias
    if torch.compiler.is_compiling():  # the compiler decides where to add
        return F.linear(x, layer.weight, bias) + residual
    residual.view(-1, residual.shape[-1]).addmm_(x.flatten(0, -2), layer.weight.t())  # not flatten, which may copy
    return residual.add_(bias)


def conv_added(conv: nn.Conv2d, x: Tensor, residual: Tensor) -> Tensor:
    """residual + conv(x). Where our kernel adds, it adds the convolution's bias in the same pass. Both (N, C, H, W)."""
    if not adds_by_kernel(residual.permute(0, 2, 3, 1), conv.bias):
        return conv(x).add_(residual)
    h = F.conv2d(x, conv.weight, None, conv.stride, conv.padding)
    return residual_add(h.permute(0, 2, 3, 1), residual.permute(0, 2, 3, 1), conv.bias).permute(0, 3, 1, 2)


class Slots:
    """Hands out consecutive numbers to the layers of a net, in the order in which they are built."""

    def __init__(self) -> None:
        self.used = 0

    def take(self, count: int = 1) -> int:
        """The first of the next `count` numbers."""
        first = self.used
        self.used += count
        return first


class DownBlock(nn.Module):
    """Layers, then a downsampler that halves the size. source: diffusers' block."""

    def __init__(self, layers: Iterable[nn.Module], source: Any):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.downsampler = source.downsamplers[0] if source.downsamplers else None

    def forward(self, x: Tensor, *given: Any, first_layer: int = 0) -> list[Tensor]:
        """x: (N, C, H, W) -> the skip tensors, the last of them the output.

        given: passed on to each layer. first_layer: the first that runs.
        """
        skips = []
        for i in range(first_layer, len(self.layers)):
            x = self.layers[i](x, *given)
            skips.append(x)
        if self.downsampler is not None:
            skips.append(self.downsampler(x))
        return skips


class MidBlock(nn.Module):
    """Layers, of which the last is a resnet alone."""

    def __init__(self, layers: Iterable[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, *given: Any) -> Tensor:
        """x: (N, C, H, W). given: passed on to each layer."""
        for layer in self.layers:
            x = layer(x, *given)
        return x


class UpBlock(nn.Module):
    """Layers over the concatenated skips, then an upsampler that doubles the size. source: diffusers' block."""

    def __init__(self, layers: Iterable[nn.Module], source: Any):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.upsample_conv = source.upsamplers[0].conv if source.upsamplers else None

    def forward(self, x: Tensor, skips: list[Tensor], *given: Any) -> Tensor:
        """x: (N, C, H, W). skips: consumed from the end. given: passed on to each layer."""
        for layer in self.layers:
            x = layer(torch.cat([x, skips.pop()], dim=1), *given)
        if self.upsample_conv is not None:
            x = self.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


def parts_of_layers(source: Any, *kinds: str) -> Iterator[tuple[Any, ...]]:
    """Each resnet of diffusers' block, with the layers of the other kinds that follow it; None where there is none.

    kinds: names of the block's lists, e.g. "attentions".
    """
    others = [getattr(source, kind, ()) for kind in kinds]
    # the middle block has one resnet more than attentions
    assert all(len(other) in {0, len(source.resnets), len(source.resnets) - 1} for other in others)
    return zip_longest(source.resnets, *others)
