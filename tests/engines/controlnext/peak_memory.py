"""Decodes videos in its own process, one after another. Prints the peak memory so far in bytes after each.

    python -m tests.engines.controlnext.peak_memory WEIGHTS LATENT_SIDE FRAMES... [--cheap]

--cheap: plain grey frames in place of the VAE's. They take no time and make a small file, so only retained memory shows.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from engines.controlnext.config import ControlNeXtConfig, ControlNeXtWeights
from engines.controlnext.decode import Decode
from engines.controlnext.spec import ControlNeXtLatents


def peak_bytes() -> int:
    """Peak memory of this process alone: `getrusage` includes the parent's, which a child inherits."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def grey(latents: Tensor, num_frames: int) -> Any:
    height, width = (8 * size for size in latents.shape[2:])
    return SimpleNamespace(sample=latents[:, :1, :1, :1].expand(-1, 3, height, width))


def main(folder: Path, side: int, frames: list[int], cheap: bool) -> None:
    torch.set_num_threads(1)
    decode = Decode(ControlNeXtConfig(weights=ControlNeXtWeights.demo(folder)))
    if cheap:
        decode.vae.decode = grey
    for num_frames in frames:
        latents = torch.randn((1, 4, num_frames, side, side), generator=torch.Generator().manual_seed(0))
        clip = decode.decode(ControlNeXtLatents(latents, 0, 2, 30))
        assert clip.num_frames == num_frames
        print(peak_bytes())


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), [int(word) for word in sys.argv[3:] if word != "--cheap"], "--cheap" in sys.argv)
