"""The request to AnimateDiff SparseCtrl LCM, and what its preprocessing passes to its denoising. No torch at import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from engines.spec import Conditioning, RenderSpec

if TYPE_CHECKING:
    from torch import Tensor

ControlType = Literal["scribble", "rgb"]


@dataclass(frozen=True)
class Keyframe:
    """An image that frame `index` (from 0) is to follow. field: the request's field that names it, for error messages."""

    index: int
    image: bytes
    field: str = "keyframe"


@dataclass(frozen=True)
class AnimateDiffSpec(RenderSpec):
    """One clip. keyframes: at most one per frame, in any order; without any, the clip is plain AnimateLCM's."""

    prompt: str
    negative_prompt: str = ""
    controlnet_type: ControlType = "scribble"
    keyframes: tuple[Keyframe, ...] = ()


@dataclass(frozen=True)
class SparseControlInput:
    """The keyframes as SparseCtrl's input, in the order of their frames.

    values: (K, 3, H, W) in [0, 1] for scribble, (K, 4, H/8, W/8) scaled VAE latents for rgb; fp32.
    frames: the K frame indices. key: identifies everything that SparseCtrl's output depends on except the timesteps, so that
    requests with the same key share it (video-models.md, 5k).
    """

    type: ControlType
    values: Tensor
    frames: tuple[int, ...]
    key: str


@dataclass(frozen=True)
class AnimateDiffConditioning(Conditioning):
    """text: (G, 77, D), fp32; G is 1, or 2 with the negative prompt first when guidance is above 1."""

    text: Tensor
    control: SparseControlInput | None
