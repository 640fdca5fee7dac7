"""The sites of the memory-bound operations: what both models compute between their matrix products, at the models' sizes.

AnimateDiff: 512x512, 16 frames, guidance in one batch of two clips. ControlNeXt SVD: 576x1024, a window of 24 frames, the halves
of guidance one after the other, so twice the calls. Theirs is what the layers run today, eagerly and as inductor fuses it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from kernels import geglu, group_norm_silu, layer_norm, residual_blend
from kernels.bench import Contest, Site, Way
from kernels.choice import INDUCTOR, forced

GROUPS = 32
"""Groups of every GroupNorm in both models."""


@dataclass(frozen=True)
class Images:
    """clips x frames images of `pixels` positions and `channels` channels."""

    clips: int
    frames: int
    pixels: int
    channels: int

    def tiny(self) -> "Images":
        """Small images of the same kind, for a CPU."""
        return Images(self.clips, 3, 5, 2 * GROUPS)


def normal(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """Normally distributed values, like activations."""
    return torch.randn(shape, device=device, dtype=dtype)


def theirs(way: Way) -> dict[str, Way]:
    """PyTorch's ways. Without a GPU, inductor is left out: it needs a compiler, and its times would say nothing about GPUs."""
    return {"eager": way} | ({INDUCTOR: torch.compile(way, dynamic=False)} if torch.cuda.is_available() else {})


def kernel(way: Way) -> Way:
    """The way with our operation in any case, never PyTorch's instead."""

    def run() -> Tensor:
        with forced("kernels"):
            return way()

    return run


def of_group_norm(images: Images, shared: bool, silu: bool, device: torch.device, dtype: torch.dtype, tiny: bool) -> Contest:
    """shared: the frames of a clip share statistics. Theirs is `F.group_norm`, with a clip as one image of all its rows."""
    images = images.tiny() if tiny else images
    c, frames = images.channels, images.frames if shared else 1
    x = normal(device, dtype, images.clips * images.frames, images.pixels, 1, c).permute(0, 3, 1, 2)  # channels-last
    weight, bias = normal(device, dtype, 2, c)

    def norm() -> Tensor:
        y = group_norm_silu.by_pytorch(x, weight, bias, GROUPS, 1e-5, frames, silu)
        return y.contiguous(memory_format=torch.channels_last)

    shape = group_norm_silu.site(x, GROUPS, frames, silu)
    if device.type != "cuda":
        ours = partial(group_norm_silu.group_norm_silu, x, weight, bias, GROUPS, num_frames=frames, silu=silu)
        return Contest(shape, {"reference": kernel(ours)}, theirs(norm))
    from kernels.triton.group_norm_silu import CUTS, launch

    ways = {str(cut): partial(launch, x, weight, bias, GROUPS, 1e-5, frames, silu, *cut) for cut in CUTS}
    return Contest(shape, ways, theirs(norm))


def of_geglu(images: Images, device: torch.device, dtype: torch.dtype, tiny: bool) -> Contest:
    """The projection of a feed-forward, 2 x 4 C wide."""
    images = images.tiny() if tiny else images
    x = normal(device, dtype, images.clips * images.frames, images.pixels, 8 * images.channels)

    def product() -> Tensor:
        a, g = x.chunk(2, dim=-1)
        return a * F.gelu(g)

    shape = geglu.site(x)
    if device.type != "cuda":
        return Contest(shape, {"reference": kernel(partial(geglu.geglu, x))}, theirs(product))
    from kernels.triton.geglu import TILES, launch

    return Contest(shape, {str(tile): partial(launch, x, tile) for tile in TILES}, theirs(product))


def of_residual(images: Images, with_bias: bool, blend: bool, device: torch.device, dtype: torch.dtype, tiny: bool) -> Contest:
    """with_bias: a convolution's bias, for which cuDNN may need a separate pass. blend: SVD's, after a temporal block."""
    images = images.tiny() if tiny else images
    h, residual, other = normal(device, dtype, 3, images.clips * images.frames, images.pixels, images.channels)
    bias = normal(device, dtype, images.channels) if with_bias else None
    mix = torch.tensor([0.3], device=device)

    def added() -> Tensor:
        y = residual + (h if bias is None else h + bias)
        return torch.lerp(y, other, 0.3) if blend else y

    spatial, share = (other, mix) if blend else (None, None)
    shape = residual_blend.site(h, bias, spatial)
    if device.type != "cuda":
        blended = partial(residual_blend.residual_blend, h, residual, other, mix, bias)
        ours = blended if blend else partial(residual_blend.residual_add, h, residual, bias)
        return Contest(shape, {"reference": kernel(ours)}, theirs(added))
    from kernels.triton.residual_blend import TILES, launch

    return Contest(shape, {str(tile): partial(launch, h, residual, bias, spatial, share, tile) for tile in TILES}, theirs(added))


def of_layer_norm(images: Images, with_positions: bool, device: torch.device, dtype: torch.dtype, tiny: bool) -> Contest:
    """with_positions: AnimateDiff's table of 32 frames, on tokens (B L, F, C); the model folds it into a bias of q, k, v."""
    images = images.tiny() if tiny else images
    c, n = images.channels, images.clips * images.frames
    tokens = (images.clips * images.pixels, images.frames) if with_positions else (n, images.pixels)
    x = normal(device, dtype, *tokens, c)
    weight, bias = normal(device, dtype, 2, c)
    positions = normal(device, dtype, 32, c) if with_positions else None

    def norm() -> Tensor:
        y = F.layer_norm(x, (c,), weight, bias, 1e-5)
        return y if positions is None else y + positions[: images.frames]

    shape = layer_norm.site(x, positions)
    if device.type != "cuda":
        ours = partial(layer_norm.layer_norm, x, weight, bias, positions=positions, axis=1)
        return Contest(shape, {"reference": kernel(ours)}, theirs(norm))
    from kernels.triton.layer_norm import VALUES, launch

    return Contest(
        shape, {str(tile): partial(launch, x, weight, bias, 1e-5, positions, 1, tile) for tile in VALUES}, theirs(norm)
    )


# By level: channels, spatial transformers, motion modules of AnimateDiff, resnets. The last level includes the middle block.
LEVELS = ((320, 5, 5, 5), (640, 5, 5, 5), (1280, 5, 5, 5), (1280, 1, 6, 7))
# By level: calls of the resnets' norms by width; skips widen them on the way up. The first level includes the output's norm.
RESNETS = (
    {320: 8, 640: 2, 960: 1},
    {320: 1, 640: 6, 960: 1, 1280: 1, 1920: 1},
    {640: 1, 1280: 6, 1920: 1, 2560: 2},
    {1280: 11, 2560: 3},
)
Prepare = Callable[[torch.device, torch.dtype, bool], Contest]


def _animatediff() -> Iterator[tuple[str, str, int, Prepare]]:
    for pixels, (channels, spatial, motion, resnets), norms in zip((4096, 1024, 256, 64), LEVELS, RESNETS, strict=True):
        images = Images(2, 16, pixels, channels)
        for width, calls in norms.items():
            yield (
                "group_norm_silu",
                f"resnet {pixels} {width}",
                calls,
                partial(of_group_norm, Images(2, 16, pixels, width), False, True),
            )
        yield "group_norm_silu", f"motion {pixels}", motion, partial(of_group_norm, images, True, False)
        yield "group_norm_silu", f"image {pixels}", spatial, partial(of_group_norm, images, False, False)
        yield "geglu", f"feed-forward {pixels}", spatial + motion, partial(of_geglu, images)
        yield "residual_blend", f"residual {pixels}", 4 * spatial + 4 * motion, partial(of_residual, images, False, False)
        yield "residual_blend", f"residual and bias {pixels}", resnets, partial(of_residual, images, True, False)
        yield "layer_norm", f"tokens {pixels}", 3 * (spatial + motion), partial(of_layer_norm, images, False)
        yield "layer_norm", f"tokens and positions {pixels}", 0, partial(of_layer_norm, images, True)


def _controlnext() -> Iterator[tuple[str, str, int, Prepare]]:
    for pixels, (channels, blocks, _, resnets), norms in zip((9216, 2304, 576, 144), LEVELS, RESNETS, strict=True):
        images = Images(1, 24, pixels, channels)
        for width, calls in norms.items():
            wide = Images(1, 24, pixels, width)
            yield "group_norm_silu", f"resnet {pixels} {width}", 2 * calls, partial(of_group_norm, wide, False, True)
        yield "group_norm_silu", f"time {pixels}", 4 * resnets, partial(of_group_norm, images, True, True)
        yield "group_norm_silu", f"image {pixels}", 2 * blocks, partial(of_group_norm, images, False, False)
        yield "geglu", f"feed-forward {pixels}", 6 * blocks, partial(of_geglu, images)
        yield "residual_blend", f"residual {pixels}", 10 * blocks, partial(of_residual, images, False, False)
        yield "residual_blend", f"residual and bias {pixels}", 4 * resnets, partial(of_residual, images, True, False)
        yield "residual_blend", f"blend {pixels}", 2 * blocks, partial(of_residual, images, False, True)
        yield "layer_norm", f"tokens {pixels}", 10 * blocks, partial(of_layer_norm, images, False)


# By pixels / 4096: the decoder's norms by width. This VAE serves both models: SVD's has image resnets of the same widths.
VAE = {1: {512: 10}, 4: {512: 6}, 16: {512: 1, 256: 5}, 64: {256: 1, 128: 6}}


def _vae() -> Iterator[tuple[str, str, int, Prepare]]:
    """AnimateDiff's, 4 frames at a time, from 64x64 latents."""
    for factor, widths in VAE.items():
        for width, calls in widths.items():
            images = Images(1, 4, 4096 * factor, width)
            yield "group_norm_silu", f"decoder {4096 * factor} {width}", 4 * calls, partial(of_group_norm, images, False, True)


SITES = tuple(
    Site(operation, f"{model} {name}", calls, prepare)
    for model, sites in (("animatediff", _animatediff()), ("controlnext", _controlnext()), ("vae", _vae()))
    for operation, name, calls, prepare in sites
)
