"""The kind of the GPU, by which tiles are chosen."""

from functools import cache

import torch

WARPGROUPS = frozenset({90, 100, 103})
"""Compute capabilities whose matrix instructions read shared memory, of which a block has 227 KiB. On others, registers."""


@cache
def capability(device: torch.device) -> int:
    """The compute capability as one number: 90 for an H200."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
