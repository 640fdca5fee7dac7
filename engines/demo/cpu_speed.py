"""What makes training on a CPU faster without changing what is computed."""

from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class PlainAttention:
    """A processor of diffusers' `Attention`: the fused kernel's backward pass would take half of a step.

    A context of fewer entries than images is shared by the frames of each clip.
    """

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> Tensor:
        """hidden_states: (B F, L, C). encoder_hidden_states: (B, M, D), or (B F, M, D), or None for self-attention."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        batch, width = context.shape[0], hidden_states.shape[-1]
        query = attn.to_q(hidden_states).reshape(batch, -1, attn.heads, width // attn.heads).transpose(1, 2)  # F L tokens
        key = attn.to_k(context).unflatten(-1, (attn.heads, -1)).permute(0, 2, 3, 1)
        value = attn.to_v(context).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        out = ((query * attn.scale) @ key).softmax(dim=-1) @ value  # (B, heads, F L, D)
        return attn.to_out[0](out.transpose(1, 2).reshape(hidden_states.shape))


def use_plain_attention(net: nn.Module) -> None:
    """Set it in every attention of `net`."""
    for module in net.modules():
        if isinstance(module, Attention):
            module.set_processor(PlainAttention())


def use_channels_last(net: nn.Module) -> None:
    """For images' convolutions, but not for norms, whose backward pass is ten times slower in that format."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        elif isinstance(module, nn.GroupNorm):
            module.forward = partial(_norm, module)  # type: ignore[method-assign]


def _norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    y = F.group_norm(x.contiguous(), norm.num_groups, norm.weight, norm.bias, norm.eps)
    return y.contiguous(memory_format=torch.channels_last) if y.ndim == 4 else y


def use_flat_temporal_convs(net: nn.Module) -> None:
    """Convolutions over time alone run as two-dimensional ones: in bfloat16 oneDNN 3.12's three-dimensional ones give NaN."""
    for module in net.modules():
        if isinstance(module, nn.Conv3d):
            assert module.kernel_size == (3, 1, 1)
            module.forward = partial(_over_time, module)  # type: ignore[method-assign]


def _over_time(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """x: (B, C, F, H, W)."""
    flat = F.conv2d(x.flatten(3), conv.weight.squeeze(-1), conv.bias, padding=(1, 0))  # (B, C', F, H W)
    return flat.unflatten(3, x.shape[3:])
