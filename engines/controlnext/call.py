"""SVD's UNet call with flat tensors as inputs: the arguments of `unet.py`, by name."""

from typing import Any

import torch
from torch import Tensor, nn

from engines.backends.unet_call import Dims, UNetCall, numbered, sides, skip_levels, unet_call
from engines.controlnext.nets.layers import Biases, SelfAttention
from engines.controlnext.nets.unet import Control, Half, SVDUNet


def svd_call(unet: SVDUNet, controlled: bool = True) -> UNetCall:
    """The UNet call of one window in one half. controlled: whether the control's maps are an input (the conditional half)."""
    weight = unet.conv_in.weight
    levels = skip_levels(unet.down, unet.conv_in.out_channels)
    image_width: Any = next(m.cross_v.in_features for m in unet.modules() if isinstance(m, SelfAttention))
    with torch.no_grad():
        half = unet.guidance_half(weight.new_zeros(unet.latent_channels, 1, 1), weight.new_zeros(1, image_width))
        (time,) = unet.time_biases((0.0,), (0.0, 0.0, 0.0))
    full = sides(1)
    dims: dict[str, Dims] = {
        "latents": ("frames", unet.latent_channels, *full),
        "image": (1, unet.conv_in.out_channels, *full),
    }
    dims |= {name: tuple(t.shape) for name, t in (*numbered("context", half.context), *numbered("time", time))}
    if controlled:
        channels, ratio = _trunk(unet)
        dims |= {"control": ("frames", channels, *sides(ratio)), "control_scale": (1,)}
    deepest = levels[-1][1]
    name = "svd" + ("-controlled" if controlled else "")
    return unet_call(name, _SVDCall(unet, len(half.context), len(time)), dims, weight, deepest)


def no_control(unet: SVDUNet, latents: Tensor) -> Control:
    """Maps and a scale of zero for latents (F, C, h, w): adding them changes no bit, so one engine serves both halves."""
    frames, _, height, width = latents.shape
    channels, ratio = _trunk(unet)
    return Control(latents.new_zeros(frames, channels, height // ratio, width // ratio), 0.0)


def svd_inputs(latents: Tensor, half: Half, time: Biases, control: Control | None = None) -> dict[str, Tensor]:
    """The arguments of `SVDUNet.forward` under the graph's input names."""
    inputs = {"latents": latents, "image": half.image}
    inputs |= dict((*numbered("context", half.context), *numbered("time", time)))
    # `new_full` fills on the device; `new_tensor` would copy from the host, which waits for all work that is under way
    return (
        inputs if control is None else inputs | {"control": control.maps, "control_scale": latents.new_full((1,), control.scale)}
    )


def _trunk(unet: SVDUNet) -> tuple[int, int]:
    """Channels of the features that the control is added to, and the divisor of the latents' size there."""
    first: Any = unet.down[0]
    levels = skip_levels(unet.down, unet.conv_in.out_channels)
    behind = len(first.layers)  # the skips are conv_in's, then each layer's, then the first downsampler's
    return levels[behind + 1] if first.downsampler is not None else levels[behind]


class _SVDCall(nn.Module):
    def __init__(self, unet: SVDUNet, num_contexts: int, num_times: int):
        super().__init__()
        self.unet, self.num_contexts, self.num_times = unet, num_contexts, num_times

    def forward(self, *inputs: Tensor) -> Tensor:
        latents, image, *rest = inputs
        context, rest = rest[: self.num_contexts], rest[self.num_contexts :]
        time, rest = rest[: self.num_times], rest[self.num_times :]
        control = Control(rest[0], rest[1]) if rest else None  # type: ignore[arg-type]  # the scale as a tensor: it may change
        return self.unet(latents, Half(image, context), time, control)
