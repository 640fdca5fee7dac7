"""A UNet call so small that a fake library can compute it: every kind of input, one weight."""

import torch
from torch import Tensor, nn

from engines.backends.shapes import Shape, ShapeFamily
from engines.backends.unet_call import UNetCall

DIMS = {
    "latents": (2, 4, "frames", "height", "width"),
    "time": (1, 3),
    "skip_0": ("2*frames", 8, "height/2", "width/2"),
}
FIXED = ShapeFamily.fixed(4, 8, 8)
WIDE = ShapeFamily(Shape(2, 8, 8), Shape(4, 8, 8), Shape(6, 8, 12))
FAMILIES = (WIDE, FIXED)


class Scaled(nn.Module):
    """latents * weight + sum(time) + mean(skip)."""

    def __init__(self, weight: float):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight), requires_grad=False)

    def forward(self, *inputs: Tensor) -> Tensor:
        latents, time, skip = inputs
        return latents * self.weight + time.sum() + skip.mean()


def scaled_call(weight: float = 2.0, dtype: torch.dtype = torch.float32) -> UNetCall:
    module = Scaled(weight).to(dtype)
    call = UNetCall("scaled", module, {}, DIMS, 2)
    example = {name: torch.zeros(size, dtype=dtype) for name, size in call.shapes(Shape(4, 8, 8)).items()}
    return UNetCall("scaled", module, example, DIMS, 2)


def inputs_of(call: UNetCall, shape: Shape, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dtype = call.example["latents"].dtype
    return {name: torch.randn(size, generator=generator).to(dtype) for name, size in call.shapes(shape).items()}
