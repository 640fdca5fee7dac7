"""Denoising as units of work: a sampler, which holds no weights, asks for units; a stage, which holds them, runs each alone.

A unit's output depends on the unit and its request alone, and a sampler adds outputs up in a fixed order. So a request gives the
same bits whether one process runs its units one after another or many run them at once. Design D5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, Self

from engines.spec import CallEngines, Checkpoint, Latents, OnProgress, OnStep, Progress, ShouldStop

if TYPE_CHECKING:
    from torch import Tensor

Report = Checkpoint | Progress
"""What a unit of several steps tells while it runs."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One piece of a request's denoising; models add what they need, as host tensors that are no views of larger ones.

    size: how much work it is, in any one measure for the units of a model, e.g. values of its latents.
    keeps: names what a stage that has run this unit can use again for the request's other units of the same name; None: nothing.
    """

    size: float
    keeps: int | None = None

    def resumed(self, report: Checkpoint) -> Self:
        """The unit that goes on from a step which an earlier run of it reported. Most units are one step and report none."""
        return self


@dataclass(frozen=True)
class UnitOutput:
    """values: the unit's result, on the host. engine: what ran the UNet. seconds: how long it took, if that was measured."""

    values: Tensor
    engine: str
    seconds: float = 0.0


class Request(Protocol):
    """What a stage needs for the units of one request, computed once."""

    def run(self, unit: Any, tell: Callable[[Report], None], should_stop: ShouldStop | None) -> UnitOutput:
        """Raises `Cancelled` within one call of a net once `should_stop` returns true, `GenerationFailed` on bad values."""
        ...


class DenoiseStage(Protocol):
    """Noise to latents: holds the weights, and runs the units of any number of requests, one at a time."""

    @property
    def engines(self) -> CallEngines:
        """The engines in use. The bits of a step depend on them."""
        ...

    def begin(self, conditioning: Any) -> Request:
        """Prepares a request. Whoever holds the result holds the request's memory."""
        ...

    def sample(
        self,
        conditioning: Any,
        *,
        resume: Checkpoint | None = None,
        on_step: OnStep | None = None,
        on_progress: OnProgress | None = None,
        should_stop: ShouldStop | None = None,
    ) -> Latents:
        """The whole request in this process: the model's sampler over a `LocalRunner`."""
        ...


class UnitRunner(Protocol):
    """Runs the units of one request."""

    def run(self, units: Sequence[Unit], tell: Callable[[Report], None]) -> Iterator[tuple[int, UnitOutput]]:
        """Each unit's place in `units` and its output, in any order. The units are independent of each other.

        Raises `Cancelled` when the request is to stop, and a unit's error.
        """
        ...


class LocalRunner:
    """Runs units in this process, one after another."""

    def __init__(self, request: Request, should_stop: ShouldStop | None = None):
        self._request = request
        self._should_stop = should_stop

    def run(self, units: Sequence[Unit], tell: Callable[[Report], None]) -> Iterator[tuple[int, UnitOutput]]:
        """See `UnitRunner`."""
        for place, unit in enumerate(units):
            yield place, self._request.run(unit, tell, self._should_stop)


class Sampler(Protocol):
    """Drives one request from noise to latents by asking for units. It holds no weights, and computes on the host."""

    def sample(
        self,
        conditioning: Any,
        runner: UnitRunner,
        *,
        resume: Checkpoint | None = None,
        on_step: OnStep | None = None,
        on_progress: OnProgress | None = None,
    ) -> Latents:
        """Raises what the runner raises, and `GenerationFailed` on non-finite values."""
        ...


@dataclass(frozen=True, kw_only=True)
class Steps(Unit):
    """All the steps of a request that are not done. start: where to begin; None: at the beginning."""

    start: Checkpoint | None = None

    def resumed(self, report: Checkpoint) -> Self:
        """See `Unit`."""
        return replace(self, start=report)


class WholeSampler:
    """Samples a request as one unit of all its steps, which reports each. For models whose requests are short."""

    def __init__(self, config: Any = None):
        pass

    def sample(
        self,
        conditioning: Any,
        runner: UnitRunner,
        *,
        resume: Checkpoint | None = None,
        on_step: OnStep | None = None,
        on_progress: OnProgress | None = None,
    ) -> Latents:
        """See `Sampler`. A step that was reported is not reported again when the unit runs a second time."""
        done = -1 if resume is None else resume.step

        def tell(report: Report) -> None:
            nonlocal done
            if isinstance(report, Checkpoint):
                if report.step > done and on_step is not None:
                    on_step(report)
                done = max(done, report.step)
            elif report.done >= done and on_progress is not None:
                on_progress(report)

        ((_, output),) = runner.run([Steps(size=conditioning.num_inference_steps, start=resume)], tell)
        return Latents(output.values, conditioning.seed, engine=output.engine)
