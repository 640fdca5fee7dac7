"""The motion UNet's call with flat tensors as inputs: the arguments of `unet.py`, by name."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from engines.animatediff.nets.layers import CrossAttention, KeyValue, TextContext
from engines.animatediff.nets.unet import MotionUNet, Residuals
from engines.backends.unet_call import Dims, UNetCall, numbered, sides, skip_levels, unet_call

_TOKENS = 77  # in CLIP's text input

T = TypeVar("T")


def motion_call(unet: MotionUNet, halves: int = 1, controlled: bool = True) -> UNetCall:
    """The UNet call of an AnimateDiff step. halves: 2 with guidance, else 1. controlled: SparseCtrl's residuals are inputs."""
    weight = unet.conv_in.weight
    levels = _residual_levels(unet)
    deepest = levels[-1][1]
    text_width: Any = next(m.to_k.in_features for m in unet.modules() if isinstance(m, CrossAttention))
    with torch.no_grad():
        context = unet.text_context(weight.new_zeros(halves, _TOKENS, text_width))
        time = unet.time_embeddings((0,))
    images: int | str = "frames" if halves == 1 else f"{halves}*frames"
    dims: dict[str, Dims] = {
        "latents": (halves, unet.conv_in.in_channels, "frames", "height", "width"),
        "time": tuple(time.shape),
    }
    dims |= {name: tuple(tensor.shape) for name, tensor in _context_inputs(context).items()}
    if controlled:
        dims |= _residual_names([(images, channels, *sides(ratio)) for channels, ratio in levels])
    name = call_name(halves, controlled)
    return unet_call(name, _MotionCall(unet, len(context)), dims, weight, deepest)


def call_name(halves: int, controlled: bool) -> str:
    """The name that `motion_call` gives to the call of such a step."""
    return f"motion-{halves}" + ("-controlled" if controlled else "")


def no_residuals(unet: MotionUNet, latents: Tensor) -> Residuals:
    """Zeros for latents (G, 4, F, h, w): adding them changes no bit, so one engine serves clips with and without keyframes."""
    halves, _, frames, height, width = latents.shape
    sizes = [(halves * frames, channels, height // ratio, width // ratio) for channels, ratio in _residual_levels(unet)]
    *skips, mid = (latents.new_zeros(size).to(memory_format=torch.channels_last) for size in sizes)
    return Residuals(tuple(skips), mid)


def motion_inputs(latents: Tensor, time: Tensor, context: TextContext, residuals: Residuals | None = None) -> dict[str, Tensor]:
    """The arguments of `MotionUNet.forward` under the graph's input names."""
    inputs = {"latents": latents, "time": time, **_context_inputs(context)}
    return inputs if residuals is None else inputs | _residual_names([*residuals.skips, residuals.mid])


def _residual_levels(unet: MotionUNet) -> list[tuple[int, int]]:
    """(channels, divisor of the latents' size) of every residual; the middle block's comes last."""
    levels = skip_levels(unet.down, unet.conv_in.out_channels)
    return [*levels, levels[-1]]


class _MotionCall(nn.Module):
    def __init__(self, unet: MotionUNet, num_attentions: int):
        super().__init__()
        self.unet, self.num_attentions = unet, num_attentions

    def forward(self, *inputs: Tensor) -> Tensor:
        latents, time, *rest = inputs
        split = 2 * self.num_attentions
        context: list[KeyValue] = list(zip(rest[:split:2], rest[1:split:2], strict=True))
        residuals = Residuals(tuple(rest[split:-1]), rest[-1]) if len(rest) > split else None
        return self.unet(latents, time, context, residuals)


def _context_inputs(context: TextContext) -> dict[str, Tensor]:
    return {f"{kind}_{i}": t for i, pair in enumerate(context) for kind, t in zip(("key", "value"), pair, strict=True)}


def _residual_names(residuals: Sequence[T]) -> dict[str, T]:
    return {**dict(numbered("skip", residuals[:-1])), "mid": residuals[-1]}
