"""What a request asks of the three stages, computed from its parameters before anything of it is downloaded. No torch.

A *unit* of a stage is a piece of work of known size, e.g. one window in one guidance half at one step. How many units a request
has is exact or an upper bound; how long one takes is measured while the service runs. `UnitTimes` are used before that.

Memory: a stage's peak is its weights and the activations of its largest call, which grow linearly with the pixels in that call.
The slopes are fitted to `working_bytes` of the eager engine in `results/nvidia-h200.json`, fp16:

    call                                   pixels    measured    bytes a pixel    fitted       error
    UNet, AnimateDiff, guidance in 1       4.19 M    0.80 GB     190              0.82 GB      +2 %
    UNet, AnimateDiff, guidance in 2       8.39 M    1.59 GB     189              1.64 GB      +3 %
    UNet, ControlNeXt, one half            14.2 M    2.85 GB     201              2.76 GB      -3 %
    VAE, AnimateDiff, 4 frames             1.05 M    2.71 GB     2584             2.63 GB      -3 %
    VAE, ControlNeXt, 8 frames             4.72 M    11.57 GB    2452             11.84 GB     +2 %

The two VAE rows are whole jobs, whose peak is their decoding. A captured CUDA graph keeps memory of its own beside that: measured
were 0.25 to 0.79 of the call's, and about the largest is taken. Each kind of call was measured at one size a model, and other
dtypes, GPUs and engines were not measured: fp32 is taken as twice fp16, and `MARGIN` is added to every estimate.
"""

from dataclasses import dataclass

from engines.checkpoints.source import DType
from engines.config import ModelConfig

UNET_BYTES = 195.0
"""Of activations for a pixel of a UNet call in fp16."""
GRAPH_BYTES = 150.0
"""The same of what a CUDA graph of that call keeps."""
VAE_BYTES = 2510.0
"""Of activations for a pixel of a call of a VAE's decoder in fp16."""
MARGIN = 1.1
"""The largest error of the fit is 3 %; the rest is for the allocator's blocks and what was not measured."""

UnitTimes = tuple[float, float, float]
"""Seconds a unit of preprocessing, denoising and decoding takes."""


@dataclass(frozen=True)
class Demand:
    """units: of preprocessing, denoising and decoding. parallel: units of denoising that can run at the same time."""

    units: tuple[float, float, float] = (1.0, 1.0, 1.0)
    parallel: int = 1


def unet_bytes(pixels: float, config: ModelConfig) -> float:
    """Activations of a UNet call on so many pixels of the output, with what a CUDA graph of it keeps."""
    graphed = config.engine.back_end != "eager"  # inductor captures graphs too; TensorRT was not measured
    return MARGIN * pixels * (UNET_BYTES + GRAPH_BYTES * graphed) * bytes_ratio(config.dtype)


def vae_bytes(pixels: float, config: ModelConfig) -> float:
    """Activations of a call of the VAE's decoder on so many pixels of the output."""
    return MARGIN * pixels * VAE_BYTES * bytes_ratio(config.dtype)


def bytes_ratio(dtype: DType) -> float:
    """The size of a number of a dtype relative to fp16's."""
    return 2.0 if dtype == "float32" else 1.0
