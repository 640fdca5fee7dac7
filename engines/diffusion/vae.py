"""A VAE's decoder with norms, SiLUs, biases and residuals fused into shared passes, with diffusers' weights.

Its images are the largest tensors of a job. Apart from the convolutions, nearly all of its time goes into passes over them.
"""

from typing import Any

from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from engines.diffusion.layers import GroupNorm, conv_added


class ImageResnet(nn.Module):
    """diffusers' `ResnetBlock2D` as a VAE uses it: without a time embedding."""

    def __init__(self, source: Any):
        super().__init__()
        assert source.time_emb_proj is None
        assert source.output_scale_factor == 1.0
        self.norm1, self.norm2 = GroupNorm(source.norm1, silu=True), GroupNorm(source.norm2, silu=True)
        self.conv1, self.conv2, self.shortcut = source.conv1, source.conv2, source.conv_shortcut

    def forward(self, x: Tensor, temb: None = None) -> Tensor:
        """x: (N, C, H, W) -> (N, C', H, W). temb: always None; diffusers' code passes it."""
        bias, later = self.conv1.bias, self.norm2.takes_bias(x)
        h = F.conv2d(self.norm1(x), self.conv1.weight, None if later else bias, padding=1)
        h = self.norm2(h, added=bias if later else None)
        return conv_added(self.conv2, h, x if self.shortcut is None else self.shortcut(x))


def fuse(decoder: nn.Module) -> None:
    """Replaces the image resnets and the last norm of diffusers' decoder, which must be in channels-last memory, in place."""
    parents = [module for module in decoder.modules() if not isinstance(module, ResnetBlock2D)]
    for parent in parents:
        for name, child in list(parent.named_children()):
            if isinstance(child, ResnetBlock2D):
                setattr(parent, name, ImageResnet(child))
    last: Any = decoder
    assert isinstance(last.conv_act, nn.SiLU), last.conv_act
    last.conv_norm_out, last.conv_act = GroupNorm(last.conv_norm_out, silu=True), nn.Identity()
