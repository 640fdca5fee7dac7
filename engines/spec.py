"""What the three stages pass to each other: frozen dataclasses of host tensors. Also the interface of a stage.

A model derives its own spec and conditioning from the bases here and keeps them in its folder. Nothing here imports
torch, so the ingress can build a spec without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from engines.media.video import Frames


@dataclass(frozen=True)
class RenderSpec:
    """A request to a model, with all media already fetched: the input of `Preprocess`."""

    seed: int
    num_inference_steps: int
    guidance_scale: float


@dataclass(frozen=True)
class Conditioning:
    """What `Preprocess` computes and `Denoise` needs; models add their tensors.

    seed: the request's seed. rng_state: (5056,) uint8, state of the request's one CPU generator after every draw
    that preprocessing made, so that all draws of a request come from one stream in a fixed order.
    notes: for the caller's log, e.g. that the prompt was cut.
    """

    seed: int
    num_inference_steps: int
    guidance_scale: float
    rng_state: Tensor
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A job between two steps; resuming from it gives the same bits as an uninterrupted run.

    step: steps already done, of `steps`. latents: (B, C, T, H/8, W/8), fp32, on the host.
    rng_state: (5056,) uint8, the generator after the draws of those steps. engine: what ran the UNet in those steps.
    """

    step: int
    steps: int
    latents: Tensor
    rng_state: Tensor
    engine: str = field(default="", kw_only=True)


@dataclass(frozen=True)
class Latents:
    """A denoised clip. values: (B, C, T, H/8, W/8), fp32, unit variance, on the host. engine: what ran the UNet."""

    values: Tensor
    seed: int
    engine: str = field(default="eager", kw_only=True)


@dataclass(frozen=True)
class Clip:
    """An encoded video. mp4: H.264 yuv420p, index in front. fps in frames per second. engine: what ran the UNet."""

    mp4: bytes
    num_frames: int
    height: int
    width: int
    fps: int
    seed: int
    engine: str = field(default="eager", kw_only=True)


@dataclass(frozen=True)
class Progress:
    """How much of a stage's work is done: `done` of `total` units. unit: one word for the caller's log, e.g. "pose".

    within: the progress of the current unit, e.g. window 5 of 13 of a step.
    """

    unit: str
    done: int
    total: int
    within: Progress | None = None

    @property
    def fraction(self) -> float:
        """The share of the work that is done, in [0, 1]."""
        if self.total <= 0:
            return 1.0
        begun = 0.0 if self.within is None else self.within.fraction
        return min(1.0, max(0.0, (self.done + begun) / self.total))


CallEngines = tuple[tuple[str, str], ...]
"""(name of a UNet's call, name of the engine that runs it), sorted; calls without an engine, which run eagerly, are left out."""

OnStep = Callable[[Checkpoint], None]
OnProgress = Callable[[Progress], None]
ShouldStop = Callable[[], bool]
"""Called between units of work; once it returns true, the stage raises `Cancelled`."""


class PreprocessStage(Protocol):
    """Media and text to tensors."""

    def encode(self, spec: Any, *, on_progress: OnProgress | None = None, should_stop: ShouldStop | None = None) -> Conditioning:
        """Raises `ModelError` for media that cannot be used, `Cancelled` within one frame once `should_stop` returns true."""
        ...


class DecodeStage(Protocol):
    """Latents to an encoded clip."""

    def frames(self, latents: Any) -> Frames:
        """The frames, decoded chunk by chunk as they are read."""
        ...

    def decode(self, latents: Any, *, on_progress: OnProgress | None = None, should_stop: ShouldStop | None = None) -> Clip:
        """The frames, encoded as they come. Raises `Cancelled` within one VAE call once `should_stop` returns true."""
        ...
