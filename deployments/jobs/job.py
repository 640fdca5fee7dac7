"""The states of a job and the only transitions between them.

                    ┌────────── requeue ──────────┐
                    v                             │
    submit ───> QUEUED ───────── claim ───────> RUNNING ───> SUCCEEDED
                  │ │                            │   │
                  │ └──────────> FAILED <────────┘   │
                  └────────────> CANCELLED <─────────┘

The database refuses every other transition (`sql/functions.sql`). fal's protocol has three words for these five: IN_QUEUE,
IN_PROGRESS, and COMPLETED for every end.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from deployments.schemas.failures import Failure
from deployments.schemas.inputs import INPUT_VERSION
from deployments.schemas.submission import RetryCondition


class JobState(StrEnum):
    """Where a job stands."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether nothing can follow."""
        return not TRANSITIONS[self]


TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.FAILED, JobState.CANCELLED}),
    JobState.RUNNING: frozenset({JobState.QUEUED, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}


class LeaseLost(Exception):
    """The attempt is no longer this worker's: its lease ended and the job went on without it."""


@dataclass(frozen=True)
class Idempotency:
    """Makes a submission repeatable: for `keep_s` seconds its owner's `key` stands for one job.

    fingerprint: of what was submitted; the same key with another fingerprint is refused.
    """

    key: str
    fingerprint: bytes
    keep_s: float = 86_400.0


@dataclass(frozen=True)
class NewJob:
    """A submission. priority: lower goes first. start_timeout_s: seconds until it must have started, or fails.

    retries: condition -> how many more attempts may follow those that ended in it; the others follow `retry.py` alone.
    files_s: how long its files are kept, in seconds; None: as long as the operator's settings say. files_access: who may read
    them, as fal's `initial_acl`; None: everybody who knows their URLs. store_io: False deletes its input at its end, and the rest
    within hours.
    service_url: where its caller reached the service, for the URLs in the webhook.
    files: names in the file store of the files that its input refers to; they expire with the job's end. Each must have been
    listed, see `Retention.add_file`. notes: the first lines of its log, all WARN. input_version: of the schemas that accepted it.
    traceparent: the trace that it belongs to, see `deployments/tracing.py`.
    units: of work in preprocessing, denoising and decoding. parallel: units of denoising that can run at the same time.
    """

    endpoint: str
    input: dict[str, Any]
    owner: str | None = None
    priority: int = 0
    start_timeout_s: float | None = None
    max_attempts: int = 10
    retries: Mapping[RetryCondition, int] = field(default_factory=dict)
    webhook_url: str | None = None
    idempotency: Idempotency | None = None
    files_s: float | None = None
    files_access: dict[str, Any] | None = None
    store_io: bool = True
    service_url: str | None = None
    files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    input_version: int = INPUT_VERSION
    traceparent: str | None = None
    units: tuple[float, float, float] = (1.0, 1.0, 1.0)
    parallel: int = 1


@dataclass(frozen=True)
class LogLine:
    """A line a caller sees. seq: 1, 2, 3, ... within a job, over all its attempts. level: one of fal's (INFO, WARN, ERROR, ...).

    progress: machine-readable progress, for progress lines; see `StageProgress.fields`.
    """

    seq: int
    at: datetime
    level: str
    message: str
    progress: dict[str, Any] | None = None


@dataclass(frozen=True)
class Job:
    """A job as a caller may see it. position: jobs of its endpoint ahead of it, while queued. Times are UTC.

    lines: those that were asked for. traceparent: see `NewJob`.
    """

    id: UUID
    endpoint: str
    owner: str | None
    state: JobState
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    attempt: int
    cancel_requested: bool
    position: int | None
    result: dict[str, Any] | None
    failure: Failure | None
    metrics: dict[str, Any]
    lines: tuple[LogLine, ...] = ()
    traceparent: str | None = None


@dataclass(frozen=True)
class JobEvent:
    """The job came to `state`. attempt: its last one so far; 0 before the first. reason: where the state does not say it. UTC."""

    at: datetime
    state: JobState
    attempt: int
    reason: str | None


@dataclass(frozen=True)
class JobSummary:
    """A job in a list. attempt: its last one so far; 0 before the first. Times are UTC."""

    id: UUID
    endpoint: str
    state: JobState
    created_at: datetime
    attempt: int
    max_attempts: int


@dataclass(frozen=True)
class Claim:
    """One attempt at a job. Only the holder of `token` may report on it.

    priority: a lower one comes first.
    checkpoint: the name in the file store under which attempts keep how far they came. resumes: there was an earlier attempt.
    lost_in: stage -> how many earlier attempts were lost while it worked. retries: what is left of `NewJob.retries`.
    created_at: when it was submitted, in UTC. waited_s: seconds from then to this claim. traceparent: see `NewJob`.
    """

    job_id: UUID
    token: UUID
    endpoint: str
    owner: str | None
    input: dict[str, Any]
    input_version: int
    priority: int
    attempt: int
    max_attempts: int
    files_s: float | None
    files_access: dict[str, Any] | None
    checkpoint: str
    resumes: bool
    lost_in: dict[str, int]
    retries: dict[RetryCondition, int]
    created_at: datetime
    waited_s: float
    traceparent: str | None
