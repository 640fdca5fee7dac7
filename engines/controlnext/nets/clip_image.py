"""The reference image as CLIP's input: SVD's own antialiased resize to 224x224, then CLIP's normalisation.

Another resize would give an embedding unlike those that the model was trained with. `video-models.md` 2B.7.
"""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the pixels of CLIP's training images, by channel. Radford et al., arXiv 2103.00020."""


def clip_pixels(image: Tensor, size: int) -> Tensor:
    """image: (3, H, W) in [0, 1] -> (1, 3, size, size), normalised for CLIP."""
    blurred = _blur((2 * image - 1)[None], size)
    # as in SVD's pipeline: corners are aligned, and values that bicubic weights push out of the range are kept
    small = F.interpolate(blurred, (size, size), mode="bicubic", align_corners=True) / 2 + 0.5
    mean, std = (torch.tensor(t, dtype=image.dtype, device=image.device)[:, None, None] for t in (MEAN, STD))
    return (small - mean) / std


def _blur(image: Tensor, size: int) -> Tensor:
    """Gaussian blur along each side by how much it shrinks: sigma = max((factor - 1) / 2, 0.001). image: (1, 3, H, W)."""
    for dim in (-2, -1):
        sigma = max((image.shape[dim] / size - 1) / 2, 0.001)
        taps = int(max(4 * sigma, 3)) | 1  # odd
        offsets = torch.arange(taps, dtype=image.dtype, device=image.device) - taps // 2
        weights = torch.exp(-(offsets**2) / (2 * sigma**2))
        shape, half = ((taps, 1), (0, 0, taps // 2, taps // 2)) if dim == -2 else ((1, taps), (taps // 2, taps // 2, 0, 0))
        kernel = (weights / weights.sum()).reshape(1, 1, *shape).expand(3, 1, *shape)
        image = F.conv2d(F.pad(image, half, mode="reflect"), kernel, groups=3)
    return image
