"""ControlNeXt's net: a pose image to one feature map that is added to the UNet's trunk, for each frame independently.

Attribute names are the checkpoint's. The layers up to the first resnet's first convolution do not depend on the timestep, so
`prefix` can be kept for a whole request (5d). ControlNeXt, arXiv 2408.06070; `video-models.md` section 1B.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

_STEM_GROUPS, _RESNET_GROUPS, _MID_GROUPS = 2, (4, 8), 8
_EPSILON = 1e-5


@dataclass(frozen=True)
class ControlNetSize:
    """Widths; the defaults are the published net's. out: the width of the UNet's first level. time: the sinusoid's length."""

    stem: tuple[int, int, int] = (64, 64, 128)
    levels: tuple[int, int] = (128, 256)
    out: int = 320
    time: int = 128


@dataclass(frozen=True)
class Prefix:
    """What does not depend on the timestep. stem: the first resnet's input. hidden: its conv1's output. Both (n, C, h, w)."""

    stem: Tensor
    hidden: Tensor

    @property
    def size_bytes(self) -> int:
        """Memory held."""
        return sum(t.numel() * t.element_size() for t in (self.stem, self.hidden))


class ControlNet(nn.Module):
    """52 tensors, 3.53 M parameters as published."""

    def __init__(self, size: ControlNetSize = ControlNetSize()):
        super().__init__()
        embedded = 2 * size.time
        a, b, c = size.stem
        low, high = size.levels
        self.time_proj = Timesteps(size.time, True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(size.time, embedded)
        self.embedding = nn.Sequential(
            nn.Conv2d(3, a, 3, stride=2, padding=1),
            nn.GroupNorm(_STEM_GROUPS, a),
            nn.ReLU(),
            nn.Conv2d(a, b, 3),
            nn.GroupNorm(_STEM_GROUPS, b),
            nn.ReLU(),
            nn.Conv2d(b, c, 3),
            nn.GroupNorm(_STEM_GROUPS, c),
            nn.ReLU(),
        )
        widths = ((c, low), (low, high))
        self.down_res = nn.ModuleList(
            ResnetBlock2D(in_channels=i, out_channels=o, temb_channels=embedded, groups=groups)
            for (i, o), groups in zip(widths, _RESNET_GROUPS, strict=True)
        )
        self.down_sample = nn.ModuleList(Downsample2D(o, use_conv=True, out_channels=o, padding=1, name="op") for _, o in widths)
        self.mid_convs = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Conv2d(high, high, 3, padding=1),
                    nn.ReLU(),
                    nn.GroupNorm(_MID_GROUPS, high),
                    nn.Conv2d(high, high, 3, padding=1),
                    nn.GroupNorm(_MID_GROUPS, high),
                ),
                nn.Conv2d(high, size.out, 1),
            ]
        )

    def time_embeddings(self, times: list[float]) -> Tensor:
        """times: 0.25 ln sigma of S steps -> (S, E)."""
        weight = self.time_embedding.linear_1.weight
        return self.time_embedding(self.time_proj(torch.tensor(times, device=weight.device)).to(weight.dtype))

    def prefix(self, images: Tensor) -> Prefix:
        """The features of images that do not depend on the timestep. images: (n, 3, H, W) in [0, 1]."""
        stem = self.embedding(images.contiguous(memory_format=torch.channels_last))
        resnet: Any = self.down_res[0]
        return Prefix(stem, resnet.conv1(F.silu(resnet.norm1(stem))))

    def finish(self, prefix: Prefix, time: Tensor, size: tuple[int, int]) -> Tensor:
        """The maps, normalised per frame and pooled to the trunk's `size`: (n, C, h, w). time: (1, E).

        Pooling commutes with cross normalisation, so `unet.inject` needs only a small map for each frame (5e).
        """
        x = self.mid_convs[1](self._features(prefix, time))
        std, mean = frame_statistics(x)  # before pooling
        return F.adaptive_avg_pool2d(((x - mean) / (std + _EPSILON)).to(x.dtype), size)

    def _features(self, prefix: Prefix, time: Tensor) -> Tensor:
        resnet: Any = self.down_res[0]
        bias = resnet.time_emb_proj(F.silu(time))[:, :, None, None]
        h = resnet.conv2(F.silu(resnet.norm2(prefix.hidden + bias)))
        shortcut = prefix.stem if resnet.conv_shortcut is None else resnet.conv_shortcut(prefix.stem)
        x = self.down_sample[0](shortcut + h)
        x = self.down_sample[1](self.down_res[1](x, time))
        return x + self.mid_convs[0](x)


def frame_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Unbiased deviation and mean of each frame, each (n, 1, 1, 1), fp32 at least. x: (n, C, h, w)."""
    return torch.std_mean(x.to(torch.promote_types(x.dtype, torch.float32)), dim=(1, 2, 3), keepdim=True)
