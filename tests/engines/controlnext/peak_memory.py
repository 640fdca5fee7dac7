"""Decodes a video of the given number of frames in a process of its own; prints its peak memory in bytes. Run by a test."""

import resource
import sys
from pathlib import Path

import torch

from engines.controlnext.config import ControlNeXtConfig, ControlNeXtWeights
from engines.controlnext.decode import Decode
from engines.controlnext.spec import ControlNeXtLatents


def main(folder: Path, num_frames: int) -> None:
    torch.set_num_threads(1)
    decode = Decode(ControlNeXtConfig(weights=ControlNeXtWeights.demo(folder)))
    latents = torch.randn((1, 4, num_frames, 4, 4), generator=torch.Generator().manual_seed(0))
    clip = decode.decode(ControlNeXtLatents(latents, 0, 2, 30))
    assert clip.num_frames == num_frames
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
