"""UNets' calls to compile, and inputs for them."""

import torch
from torch import Tensor, nn

from engines.animatediff.call import motion_call
from engines.backends.shapes import Shape
from engines.backends.unet_call import Dims, UNetCall, unet_call
from engines.controlnext.call import svd_call
from tests.engines.backends.unets import motion_unet, svd_unet

SHAPE, OTHER = Shape(3, 4, 8), Shape(2, 8, 4)


class Toy(nn.Module):
    """latents + bias, and what the frames are numbered, kept like SVD's positions."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, Tensor] = {}

    def forward(self, latents: Tensor, bias: Tensor) -> Tensor:
        frames = latents.shape[0]
        if frames not in self.kept:
            self.kept[frames] = torch.arange(frames, device=latents.device)[:, None, None, None].float()
        return latents * 2 + self.kept[frames] + bias[:, None, None]


def toy(module: nn.Module | None = None, device: str = "cpu") -> UNetCall:
    dims: dict[str, Dims] = {"latents": ("frames", 4, "height", "width"), "bias": (4,)}
    return unet_call("toy", module or Toy(), dims, torch.zeros(1, device=device), 2)


def motion(device: str = "cpu", dtype: torch.dtype = torch.float32) -> UNetCall:
    return motion_call(motion_unet(1, device, dtype), halves=2)


def svd(device: str = "cpu", dtype: torch.dtype = torch.float32) -> UNetCall:
    return svd_call(svd_unet(device, dtype))


def random_inputs(call: UNetCall, shape: Shape, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(size, generator=generator) for name, size in call.shapes(shape).items()}
