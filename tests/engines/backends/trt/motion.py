"""A call with every kind of attention in the UNets, small enough to be exported in seconds."""

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from engines.animatediff.nets.layers import MotionBlock
from engines.backends.unet_call import UNetCall, unet_call
from kernels.attention import attention
from kernels.temporal_attention import temporal_attention

HEADS, HEAD_DIM = 2, 16
CHANNELS = HEADS * HEAD_DIM
DIMS = {"latents": (2, "frames", "height", CHANNELS)}


class Motion(nn.Module):
    """AnimateDiff's two attentions over frames with a position table, SVD's one without, and one within a frame."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        positions = {"positional_embeddings": "sinusoidal", "num_positional_embeddings": 32}
        self.block = MotionBlock(BasicTransformerBlock(CHANNELS, HEADS, HEAD_DIM, double_self_attention=True, **positions))
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)

    def forward(self, *inputs: Tensor) -> Tensor:
        (latents,) = inputs
        frames = latents.shape[1]
        x = self.block(latents.flatten(0, 1).clone(), frames)  # (2 F, L, C)
        x = x + temporal_attention(self.qkv(x), frames, HEADS)
        x = x + attention(*self.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(2)).flatten(2)
        return x.unflatten(0, (2, -1))


def small_motion_call() -> UNetCall:
    return unet_call("small-motion", Motion().requires_grad_(False).eval(), DIMS, torch.empty(()), multiple=2)
