"""What one attempt at a job took: for its caller's status and receipt, and for the operator's metrics."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from deployments import metrics, tracing
from deployments.stages.progress import Stage
from deployments.stages.protocol import Done

Outcome = Literal["succeeded", "failed", "rejected", "retried", "cancelled", "released", "lost"]
"""How an attempt ended. rejected: the request was at fault, e.g. by a file that is no image. released: its dispatcher shut down.
lost: the job goes on without it.
"""


@dataclass
class AttemptMetrics:
    """seconds: of work in each stage that ran, without waiting. gpu_seconds: the same of GPUs. engine: what ran the UNet.

    at_work: the stage that works on the job now; None while it waits for a stage's turn. clock: in seconds.
    """

    endpoint: str
    seconds: dict[Stage, float] = field(default_factory=dict)
    gpu_seconds: dict[Stage, float] = field(default_factory=dict)
    engine: str | None = None
    at_work: Stage | None = None
    clock: Callable[[], float] = time.monotonic
    _called_at: float | None = None
    _stages_receipt: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def call(self, stage: Stage) -> Iterator[None]:
        """The block calls the stage, whose turn has not come yet. The call is a span of the job's trace."""
        self.at_work, self._called_at = None, self.clock()
        with tracing.span(stage, tracing.current(), endpoint=self.endpoint):
            yield

    def working(self, stage: Stage) -> None:
        """The stage has begun, or noted progress."""
        self.at_work = stage
        if self._called_at is not None:
            tracing.note("its turn has come")
            metrics.STAGE_WAIT.record(self.clock() - self._called_at, endpoint=self.endpoint, stage=stage)
            self._called_at = None

    def done(self, stage: Stage, done: Done[Any]) -> None:
        """The stage has ended with a product."""
        self.at_work = None
        self.seconds[stage] = done.seconds
        self._stages_receipt |= done.receipt
        tracing.note("ended", seconds=done.seconds, gpu_seconds=done.gpu_seconds)
        metrics.STAGE.record(done.seconds, endpoint=self.endpoint, stage=stage)
        if done.gpu_seconds > 0:
            self.gpu_seconds[stage] = done.gpu_seconds
            metrics.GPU.record(done.gpu_seconds, endpoint=self.endpoint, stage=stage)

    def ended(self, outcome: Outcome) -> None:
        """The attempt has ended."""
        tracing.note(outcome)
        metrics.ATTEMPTS.record(endpoint=self.endpoint, outcome=outcome)
        if outcome == "succeeded":
            metrics.JOB_GPU.record(sum(self.gpu_seconds.values()), endpoint=self.endpoint)

    @property
    def fields(self) -> dict[str, Any]:
        """The metrics in a status: fal's `inference_time` and, for a job that succeeded, our own receipt.

        A stage that an earlier attempt finished is not in it.
        """
        fields: dict[str, Any] = {"inference_time": round(sum(self.seconds.values()), 6)}
        if self.engine is not None:
            fields["receipt"] = {
                "engine": self.engine,
                "seconds": {stage: round(s, 6) for stage, s in self.seconds.items()},
                "gpu_seconds": {stage: round(s, 6) for stage, s in self.gpu_seconds.items()},
                **self._stages_receipt,
            }
        return fields
