"""The sites of both models' attentions. Every way starts at the projections' output and ends where the next projection reads it.

If a back end needs another layout, its way includes the permutes. AnimateDiff: 512x512, 16 frames, guidance in one batch of two
clips. ControlNeXt SVD: 576x1024, a window of 24 frames, the halves of guidance one after the other, so twice the calls.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import attention, temporal_attention
from kernels.bench import Contest, Site, Way

BACK_ENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def sdpa(query: Tensor, key: Tensor, value: Tensor, back_end: SDPBackend | None = None) -> Tensor:
    """PyTorch's attention by one back end, or by its own choice. (B, heads, N, D) each."""
    if back_end is None:
        return F.scaled_dot_product_attention(query, key, value)
    with sdpa_kernel(back_end):
        return F.scaled_dot_product_attention(query, key, value)


def back_ends(device: torch.device) -> Iterator[tuple[str, SDPBackend | None]]:
    """The back ends to try. On the CPU there is no choice."""
    yield "sdpa", None
    if device.type == "cuda":
        yield from BACK_ENDS.items()


def temporal(
    clips: int,
    frames: int,
    positions: int,
    heads: int,
    head_dim: int,
    table: bool,
    device: torch.device,
    dtype: torch.dtype,
    tiny: bool,
) -> Contest:
    """table: whether the model adds positions to qkv."""
    if tiny:
        positions, heads = min(positions, 9), 2
    width = heads * head_dim
    qkv = torch.randn(clips * frames, positions, 3 * width, device=device, dtype=dtype)
    position = torch.randn(32, 3 * width, device=device, dtype=dtype) if table else None
    pixels = qkv.unflatten(0, (clips, frames)).transpose(1, 2).flatten(0, 1).contiguous()  # (B S, F, 3 C)
    image = torch.randn(clips * frames, positions, width, device=device, dtype=dtype)

    def permuted(back_end: SDPBackend | None) -> Tensor:
        """From the video's layout, all clips in one call: a view is enough for one clip, more clips need a copy."""
        q, k, v = heads_first(biased()).flatten(1, 2)  # each (B S, heads, F, D)
        seen = sdpa(q, k, v, back_end).unflatten(0, (clips, positions))  # (B, S, heads, F, D)
        return seen.permute(0, 3, 1, 2, 4).reshape(clips * frames, positions, width)

    def clip_by_clip(back_end: SDPBackend | None) -> Tensor:
        """From the video's layout without copies of q, k and v."""
        seen = [sdpa(q, k, v, back_end).permute(2, 0, 1, 3) for q, k, v in heads_first(biased()).unbind(1)]  # (F, S, heads, D)
        return torch.cat(seen).flatten(2)

    def biased() -> Tensor:
        x = qkv.unflatten(0, (clips, frames))
        return x if position is None else x + position[:frames, None]

    def heads_first(x: Tensor) -> Tensor:
        return x.unflatten(-1, (3, heads, -1)).permute(3, 0, 2, 4, 1, 5)  # (3, B, S, heads, F, D)

    def pixel_layout(back_end: SDPBackend | None) -> Tensor:
        """From the pixels' layout, as `MotionModule` holds it: two permutes for two attentions, so one for each."""
        image.unflatten(0, (clips, frames)).transpose(1, 2).contiguous()
        x = pixels if position is None else pixels + position[:frames]
        q, k, v = x.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # each (B S, heads, F, D)
        seen = sdpa(q, k, v, back_end).transpose(1, 2).reshape(clips, positions, frames, width)
        return seen.transpose(1, 2)

    forms = {"permuted": permuted, "pixel layout": pixel_layout} | ({"clip by clip": clip_by_clip} if clips > 1 else {})
    theirs = {f"{name}, {form}": partial(way, which) for form, way in forms.items() for name, which in back_ends(device)}
    return Contest(temporal_attention.site(qkv, frames, heads, position), _temporal_ways(qkv, frames, heads, position), theirs)


def _temporal_ways(qkv: Tensor, frames: int, heads: int, position: Tensor | None) -> dict[str, Way]:
    if qkv.device.type != "cuda":
        return {"reference": lambda: temporal_attention.temporal_attention(qkv, frames, heads, position)}
    from kernels.triton.temporal_attention import launch, tiles_of

    return {str(tile): partial(launch, qkv, frames, heads, position, tile) for tile in tiles_of(qkv, frames, heads)}


def spatial(
    batch: int, tokens: int, keys: int, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype, tiny: bool
) -> Contest:
    """keys: how many the text has, in a separate tensor; 0 for self-attention from a fused projection."""
    if tiny:
        batch, tokens, heads = 1, min(tokens, 65), 2
    if keys:
        q = torch.randn(batch, tokens, heads, head_dim, device=device, dtype=dtype)
        k, v = torch.randn(batch, keys, 2, heads, head_dim, device=device, dtype=dtype).unbind(2)
    else:
        q, k, v = torch.randn(batch, tokens, 3, heads, head_dim, device=device, dtype=dtype).unbind(2)

    def theirs(back_end: SDPBackend | None) -> Tensor:
        seen = sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), back_end)
        return seen.transpose(1, 2).contiguous()

    return Contest(
        attention.site(q, k), _flash_ways(q, k, v), {name: partial(theirs, which) for name, which in back_ends(device)}
    )


def _flash_ways(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Way]:
    if q.device.type != "cuda":
        return {"reference": lambda: attention.attention(q, k, v)}
    from kernels.triton.flash_attention import launch, tiles_of

    return {str(tile): partial(launch, q, k, v, tile) for tile in tiles_of(q)}


def _sites() -> Iterator[Site]:
    for positions, head_dim, motion, image in ((4096, 40, 10, 5), (1024, 80, 10, 5), (256, 160, 10, 5), (64, 160, 12, 1)):
        form = partial(temporal, 2, 16, positions, 8, head_dim, True)
        yield Site("temporal_attention", f"animatediff motion {positions}", motion, form)
        form = partial(spatial, 32, positions, 0, 8, head_dim)
        yield Site("attention", f"animatediff image {positions}", image, form)
        form = partial(spatial, 2, 16 * positions, 77, 8, head_dim)
        yield Site("attention", f"animatediff text {positions}", image, form)
    for positions, heads, calls in ((9216, 5, 10), (2304, 10, 10), (576, 20, 10), (144, 20, 2)):
        form = partial(temporal, 1, 24, positions, heads, 64, False)
        yield Site("temporal_attention", f"controlnext time {positions}", calls, form)
        form = partial(spatial, 24, positions, 0, heads, 64)
        yield Site("attention", f"controlnext image {positions}", calls, form)


SITES = tuple(_sites())
