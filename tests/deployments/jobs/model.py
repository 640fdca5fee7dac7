"""A model of the job store's promises in plain Python: one process, no database, lists instead of indexes.

It is slow and obvious on purpose. It was written from the docstrings of `JobStore` and `job.py`, not from the SQL. Times are
whole seconds of a clock that stands still until it is moved.
"""

from dataclasses import dataclass, field
from uuid import UUID

from deployments.jobs.claims import LOW_SHARE
from deployments.jobs.job import Claim, Idempotency, JobState, LeaseLost, NewJob
from engines.errors import IdempotencyKeyReused

Event = tuple[str, int, str | None]
"""State, attempt, reason."""


@dataclass
class ModelJob:
    """One job. number: its position among all jobs ever submitted. token: of the attempt that may write."""

    id: UUID
    number: int
    new: NewJob
    turn: int
    created_at: int
    state: JobState = JobState.QUEUED
    attempt: int = 0
    token: UUID | None = None
    started_at: int | None = None
    finished_at: int | None = None
    lease_until: int = 0
    run_by: int | None = None
    not_before: int | None = None
    cancel_requested: bool = False
    error_type: str | None = None
    events: list[Event] = field(default_factory=list)
    logs: list[str] = field(default_factory=list)
    released: bool = False

    @property
    def start_by(self) -> int | None:
        if self.released or self.new.start_timeout_s is None:
            return None
        return self.created_at + int(self.new.start_timeout_s)

    @property
    def place(self) -> tuple[int, int, int]:
        return (self.new.priority, self.turn, self.number)

    @property
    def waiting(self) -> bool:
        """Whether it is queued and not held back until its next attempt."""
        return self.state is JobState.QUEUED and self.not_before is None


@dataclass
class Kept:
    """The submission recorded under an idempotency key."""

    fingerprint: bytes
    job_id: UUID
    expires_at: int
    rejected: bool


class Model:
    """The store. Its methods have the store's names. Ids and tokens, which the store draws at random, are passed in."""

    def __init__(self, limits: dict[str, int]) -> None:
        self.now = 0
        self.jobs: dict[UUID, ModelJob] = {}
        self.limits = limits
        self.paused: set[str] = set()
        self.kept: dict[tuple[str, str], Kept] = {}
        self._number = 0

    # Submissions.

    def repeated(self, new: NewJob) -> ModelJob | None:
        """The job that this submission repeats. Raises `IdempotencyKeyReused`."""
        if new.idempotency is None or (kept := self._standing(new.owner, new.idempotency)) is None:
            return None
        if kept.fingerprint != new.idempotency.fingerprint:
            raise IdempotencyKeyReused
        return self.jobs[kept.job_id]

    def makes_a_job(self, new: NewJob) -> bool:
        """Whether a new job is made: the caller's key is unused, or its input was rejected and the body is now another."""
        if new.idempotency is None or (kept := self._standing(new.owner, new.idempotency)) is None:
            return True
        return kept.rejected and kept.fingerprint != new.idempotency.fingerprint

    def submit(self, job_id: UUID, new: NewJob, error_type: str | None = None) -> ModelJob:
        self._number += 1
        job = ModelJob(job_id, self._number, new, self._turn(new), self.now)
        self.jobs[job_id] = job
        if new.idempotency:
            expires_at = self.now + int(new.idempotency.keep_s)
            kept = Kept(new.idempotency.fingerprint, job_id, expires_at, rejected=error_type is not None)
            self.kept[new.owner or "", new.idempotency.key] = kept
        self._to(job, JobState.QUEUED)
        if error_type:
            self._end(job, JobState.FAILED, error_type)
        return job

    def _standing(self, owner: str | None, idempotency: Idempotency) -> Kept | None:
        kept = self.kept.get((owner or "", idempotency.key))
        return kept if kept and kept.expires_at > self.now else None

    def _turn(self, new: NewJob) -> int:
        """The round being served, or if the owner already has queued jobs, the round after the last of them."""
        line = [job for job in self.jobs.values() if (job.new.endpoint, job.new.priority) == (new.endpoint, new.priority)]
        queued = [job.turn for job in line if job.state is JobState.QUEUED]
        running = [job.turn for job in line if job.state is JobState.RUNNING]
        served = min(queued) if queued else max(running, default=0)
        own = [job.turn + 1 for job in line if job.state is JobState.QUEUED and job.new.owner == new.owner]
        return max([served, *own])

    # The order.

    def position(self, job: ModelJob) -> int | None:
        if job.state is not JobState.QUEUED:
            return None
        return sum(
            other.waiting and other.new.endpoint == job.new.endpoint and other.place < job.place for other in self.jobs.values()
        )

    def running(self, owner: str | None) -> int:
        return sum(job.state is JobState.RUNNING and job.new.owner == owner for job in self.jobs.values())

    def may_start(self, endpoints: list[str]) -> list[ModelJob]:
        """Every job that may start now, in the order in which an endpoint's jobs start."""
        eligible = [
            job
            for job in self.jobs.values()
            if job.waiting
            and job.new.endpoint in endpoints
            and job.new.endpoint not in self.paused
            and (job.start_by is None or job.start_by > self.now)
            and self.running(job.new.owner) < self.limits.get(job.new.owner or "", 1_000_000)
        ]
        return sorted(eligible, key=lambda job: job.place)

    def next(self, endpoints: list[str], claimed: int, low_after_s: int) -> set[UUID]:
        """The jobs of which a claim may take any: one per endpoint at most, as turns of several endpoints cannot be compared.

        claimed: how many claims the same worker process has made for these endpoints.
        """
        ready = self.may_start(endpoints)
        if (claimed + 1) % LOW_SHARE == 0:
            low = [job for job in ready if job.new.priority >= 1]
            heads = self._heads(low)
            aged = [job.id for job in heads if job.created_at <= self.now - low_after_s]
            if len(aged) == len(heads) > 0:
                return set(aged)
            if aged:  # the result depends on which endpoint the claim looks at
                return {*aged, *(job.id for job in self._heads(ready))}
        return {job.id for job in self._heads(ready)}

    def _heads(self, ready: list[ModelJob]) -> list[ModelJob]:
        """The first job of each endpoint, of those with the lowest priority number of all."""
        first: dict[str, ModelJob] = {}
        for job in ready:
            first.setdefault(job.new.endpoint, job)
        most_urgent = min((job.new.priority for job in first.values()), default=0)
        return [job for job in first.values() if job.new.priority == most_urgent]

    # Attempts.

    def claim(self, claim: Claim, lease_s: int, run_s: int | None) -> None:
        job = self.jobs[claim.job_id]
        job.attempt += 1
        job.token = claim.token
        job.started_at = self.now
        job.lease_until = self.now + lease_s
        job.run_by = None if run_s is None else self.now + run_s
        self._to(job, JobState.RUNNING)

    def heartbeat(self, claim: Claim, lease_s: int) -> bool:
        job = self._held(claim)
        job.lease_until = self.now + lease_s
        return job.cancel_requested

    def log(self, claim: Claim, message: str) -> bool:
        self._held(claim).logs.append(message)
        return True

    def close(self, claim: Claim, state: JobState, error_type: str | None) -> None:
        job = self.jobs.get(claim.job_id)
        if job and job.token == claim.token and job.state is state:
            return  # said again
        self._end(self._held(claim), state, error_type)

    def requeue(self, claim: Claim, reason: str, *, counted: bool, wait_s: int) -> None:
        job = self.jobs.get(claim.job_id)
        if job and job.token == claim.token and job.state is JobState.QUEUED:
            return  # said again
        self._lost_attempt(self._held(claim), reason, counted=counted, wait_s=wait_s)

    def _held(self, claim: Claim) -> ModelJob:
        job = self.jobs.get(claim.job_id)
        if job is None or job.token != claim.token or job.state is not JobState.RUNNING:
            raise LeaseLost
        return job

    def _lost_attempt(self, job: ModelJob, reason: str, *, counted: bool, wait_s: int = 0) -> None:
        last = counted and job.attempt >= job.new.max_attempts
        if not counted:
            job.attempt -= 1
            job.released = True
        if job.cancel_requested:
            self._end(job, JobState.CANCELLED, "client_cancelled", reason)
        elif last:
            self._end(job, JobState.FAILED, "runner_disconnected", reason)
        else:
            job.started_at = None
            job.not_before = self.now + wait_s if wait_s else None
            self._to(job, JobState.QUEUED, reason)

    # The rest.

    def request_cancel(self, job_id: UUID) -> JobState | None:
        if (job := self.jobs.get(job_id)) is None:
            return None
        found = job.state
        if not found.ended:
            job.cancel_requested = True
        if found is JobState.QUEUED:
            self._end(job, JobState.CANCELLED, "client_cancelled")
        return found

    def sweep(self) -> int:
        changed = 0
        for job in self.jobs.values():
            if job.state is JobState.RUNNING and job.lease_until < self.now:
                changed += 1
                job.token = None
                if job.run_by is not None and job.run_by <= self.now and not job.cancel_requested:
                    self._end(job, JobState.FAILED, "generation_timeout", "run deadline passed")
                else:
                    self._lost_attempt(job, "lease expired", counted=True)
        for job in self.jobs.values():
            if job.state is JobState.QUEUED and job.start_by is not None and job.start_by <= self.now:
                changed += 1
                self._end(job, JobState.FAILED, "request_timeout", "start deadline passed")
        for job in self.jobs.values():
            if job.state is JobState.QUEUED and job.not_before is not None and job.not_before <= self.now:
                job.not_before = None
        return changed

    def expire_jobs(self, jobs_s: int) -> int:
        """No webhook is ever delivered in this model, so a job that has one is kept."""
        gone = {
            job.id
            for job in self.jobs.values()
            if job.finished_at is not None and job.finished_at <= self.now - jobs_s and job.new.webhook_url is None
        }
        self.jobs = {job_id: job for job_id, job in self.jobs.items() if job_id not in gone}
        self.kept = {key: kept for key, kept in self.kept.items() if kept.job_id not in gone}
        return len(gone)

    def _end(self, job: ModelJob, state: JobState, error_type: str | None, reason: str | None = None) -> None:
        job.error_type = error_type
        job.finished_at = self.now
        self._to(job, state, reason)

    def _to(self, job: ModelJob, state: JobState, reason: str | None = None) -> None:
        job.state = state
        job.events.append((state.value, job.attempt, reason))
