"""Converts a VAE's output to the 8-bit levels that a video encoder takes."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_levels(pixels: Tensor) -> NDArray[np.uint8]:
    """pixels: (n, 3, H, W), nominally in [-1, 1], any float dtype -> (n, H, W, 3) uint8, rounded to the nearest of 256 levels."""
    unit = (pixels.float() / 2 + 0.5).clamp(0, 1)
    return unit.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
