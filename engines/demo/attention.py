"""Attention for training on a CPU: the fused kernel's backward pass takes half of a step there, plain matrix products much less."""

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn


class PlainAttention:
    """A processor of diffusers' `Attention`. A context of fewer entries than images is shared by the frames of each clip."""

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
