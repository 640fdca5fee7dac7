"""Claims jobs while the stages have room and takes each through the three stages. Every retry is decided here, by the table in
`jobs/retry.py`.

A claimed job is held by a lease that `_renew_lease` renews. If this process dies, the lease runs out and a sweep puts the job
back into the queue. If this process is only late, the store refuses its writes: they carry the token of an attempt that is over.

While the database is away, renders go on and what they have to write waits. No error ends one of the loops here: each logs it,
pauses and goes on.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

from deployments import metrics as measured
from deployments import tracing
from deployments.dispatch.attempt_metrics import AttemptMetrics, Outcome
from deployments.dispatch.job_log import JobLog
from deployments.dispatch.room import Room
from deployments.dispatch.watchdog import Deadlines, Watchdog
from deployments.files.file_store import FileStore, StoredFile
from deployments.files.uploads import take_in
from deployments.jobs import database
from deployments.jobs.database import patiently
from deployments.jobs.job import Claim, LeaseLost
from deployments.jobs.listener import Changes
from deployments.jobs.retry import condition_of, counts_losses, next_attempt_in
from deployments.jobs.store import JobStore
from deployments.schemas.endpoint import ENDPOINTS
from deployments.schemas.failures import error_failure
from deployments.stages.progress import Stage
from deployments.stages.protocol import CheckpointRef, Done, Note, OnNote, Stages, Started
from engines.errors import ModelError, ReelrayError, RequestError, RunnerFailed

logger = logging.getLogger(__name__)

T = TypeVar("T")

SWEEP_INTERVAL_S = 1.0
EXPIRY_INTERVAL_S = 60.0
IDLE_WAIT_S = 5.0
"""How long to wait for a notification of new work before looking anyway."""

RELEASE_S = 2.0
"""How long a job that we give back waits for its next attempt, so that its stage can stop and store the last step.

The stage cannot tell us when it has: Serve ends the stream of a cancelled call at once (tried on Ray 2.60: 6 ms after `cancel`,
while the stage's own code ran on for 3 s), and a deployment that shuts down accepts no calls. If the stage takes longer, the
steps since the previous checkpoint are done again.
"""
SHUTDOWN_S = 10.0
"""How long a dispatcher that shuts down waits for a database that is away. Jobs that it cannot give back wait for their lease."""


class QueueLimits(Protocol):
    """The settings of the queue that the dispatcher needs; see `QueueSettings`."""

    @property
    def lease_s(self) -> float:
        """How long a claimed job belongs to its worker after the last heartbeat, in seconds."""
        ...

    @property
    def max_in_flight(self) -> int | None:
        """The most jobs of one endpoint that may be in its stages at once; None: as many as they have room for."""
        ...

    @property
    def low_after_s(self) -> float:
        """How long a job of low priority waits behind all others, in seconds."""
        ...

    def deadlines_of(self, endpoint: str) -> Deadlines:
        """The deadlines of one attempt at a job of the endpoint."""
        ...


class Retention(Protocol):
    """How long things are kept; see `RetentionSettings`."""

    @property
    def jobs_s(self) -> float | None:
        """How long a job is kept after its end, in seconds; None: for ever."""
        ...

    def keep_file_s(self, wish_s: float | None) -> float | None:
        """How long a file is kept if its caller asks for `wish_s`, in seconds; None: for ever."""
        ...


class Dispatcher:
    """stages: endpoint id -> its stages. Any number of dispatchers may share a store."""

    def __init__(
        self,
        store: JobStore,
        files: FileStore,
        stages: Mapping[str, Stages],
        queue: QueueLimits,
        retention: Retention,
    ):
        self.store = store
        self.files = files
        self.stages = stages
        self.queue = queue
        self.retention = retention
        self.rooms: dict[str, Room] = {}

    async def run(self) -> None:
        """Works until cancelled. Then running jobs go back to the queue and are resumed; it does not count as an attempt."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._sweep_forever())
            group.create_task(self._expire_forever())
            for endpoint in self.stages:
                group.create_task(self._claim_forever(endpoint, group))

    async def _claim_forever(self, endpoint: str, group: asyncio.TaskGroup) -> None:
        """Runs one endpoint's jobs, as many at once as its stages have room for. Other endpoints' long jobs do not delay them."""
        changed = asyncio.Event()
        room = self.rooms[endpoint] = Room(self.queue.max_in_flight, changed.set)
        self.stages[endpoint].watch_replicas(room.replicas)
        working: set[asyncio.Task[None]] = set()

        def ended(task: asyncio.Task[None]) -> None:
            working.discard(task)
            changed.set()

        async with self.store.claims.watch_work() as work:
            while True:
                while len(working) >= room.jobs:
                    changed.clear()
                    await changed.wait()
                task = group.create_task(self._traced(await self._next_claim(endpoint, work)))
                working.add(task)
                task.add_done_callback(ended)

    async def _next_claim(self, endpoint: str, work: Changes) -> Claim:
        while True:
            try:
                run_s = self.queue.deadlines_of(endpoint).run_s
                if claim := await self.store.claims.take([endpoint], self.queue.lease_s, run_s, self.queue.low_after_s):
                    return claim
                await work.changed(IDLE_WAIT_S)
            except Exception:
                logger.exception("no job could be claimed", extra={"action": "claim_failed"})
                await asyncio.sleep(database.OUTAGE_PAUSE_S)

    async def _sweep_forever(self) -> None:
        """After an outage, and after this process has stood still, the workers come first: they live, and only could not renew
        their leases."""
        while True:
            pause_s = SWEEP_INTERVAL_S
            try:
                if swept := await self.store.claims.sweep():
                    logger.warning("jobs swept", extra={"action": "sweep", "jobs": swept})
                    measured.SWEPT.record(swept)
            except Exception:
                logger.exception("no jobs could be swept", extra={"action": "sweep_failed"})
                pause_s = max(pause_s, self.queue.lease_s)
            due = time.monotonic() + pause_s
            await asyncio.sleep(pause_s)
            if time.monotonic() - due > self.queue.lease_s / 10:
                await asyncio.sleep(self.queue.lease_s)

    async def _expire_forever(self) -> None:
        """Deletes expired files, jobs and secrets in batches, with a pause after each for other work."""
        while True:
            try:
                await self.store.uploads.settle_direct(partial(take_in, self.files))
                files = await self.store.retention.expire_files(self.files.delete)
                jobs = await self.store.retention.expire_jobs(self.retention.jobs_s)
                await self.store.keys.expire_secrets()
                await self.files.delete_incomplete()
            except Exception:
                logger.exception("nothing expired could be deleted", extra={"action": "expiry_failed"})
                files = jobs = 0
            await asyncio.sleep(0.05 if files or jobs else EXPIRY_INTERVAL_S)

    async def _traced(self, claim: Claim) -> None:
        """One attempt at a job, in its trace."""
        if claim.attempt == 1 and not claim.resumes:
            measured.WAIT.record(claim.waited_s, endpoint=claim.endpoint)
            with tracing.span("wait in the queue", claim.traceparent, begun_s=claim.created_at.timestamp()):
                pass
        with tracing.span("attempt", claim.traceparent, endpoint=claim.endpoint, **_fields(claim, "attempt")):
            await self._work(claim)

    async def _work(self, claim: Claim) -> None:
        """One attempt at a job, from claim to close."""
        metrics = AttemptMetrics(claim.endpoint)
        watchdog = Watchdog(self.queue.deadlines_of(claim.endpoint))
        render = asyncio.create_task(self._reported(claim, metrics, watchdog))
        renewing, claims = asyncio.create_task(self._renew_lease(claim, render, watchdog)), self.store.claims
        try:
            result = await render
        except asyncio.CancelledError:
            if not renewing.done():
                with suppress(TimeoutError):
                    async with asyncio.timeout(SHUTDOWN_S):
                        requeue = partial(claims.requeue, claim, "the dispatcher shut down", counted=False, wait_s=RELEASE_S)
                        await self._close(claim, metrics, "released", requeue)
                raise
            reason = renewing.result()
            if reason == "cancelled":
                await self._close(claim, metrics, "cancelled", lambda: claims.cancel(claim))
            elif reason == "lost":
                metrics.ended("lost")
            else:
                logger.warning("attempt stopped at its deadline", extra={**_fields(claim, "deadline"), "error": reason.type})
                await self._end_attempt(claim, reason, metrics)
        except LeaseLost:  # the job is tried again, here or elsewhere
            logger.warning("attempt given up", exc_info=True, extra=_fields(claim, "attempt_given_up"))
            metrics.ended("lost")
        except Exception as exc:
            # the caller is not told of any other error, e.g. weights that do not fit the model
            error = exc if isinstance(exc, ModelError | RequestError) else RunnerFailed()
            logger.warning("attempt failed", exc_info=exc, extra=_fields(claim, "attempt_failed"))
            await self._end_attempt(claim, error, metrics)
        else:
            await self._close(claim, metrics, "succeeded", lambda: claims.succeed(claim, result, metrics.fields))
        finally:
            renewing.cancel()

    async def _end_attempt(self, claim: Claim, error: ReelrayError, metrics: AttemptMetrics) -> None:
        """After an error: queues another attempt, or fails the job."""
        claims, losses, lost_in = self.store.claims, 0, dict(claim.lost_in)
        if metrics.at_work is not None and counts_losses(error):
            losses = lost_in[metrics.at_work] = lost_in.get(metrics.at_work, 0) + 1
        retries, condition = dict(claim.retries), condition_of(error)
        budget = retries.get(condition) if condition else None
        wait_s = next_attempt_in(error, claim.attempt, claim.max_attempts, losses, random.random(), budget)
        if wait_s is None:
            failure = error_failure(error)
            outcome: Outcome = "failed" if failure.status >= 500 else "rejected"
            await self._close(claim, metrics, outcome, lambda: claims.fail(claim, failure, metrics.fields))
            return
        if condition and budget is not None:
            retries[condition] = budget - 1
        measured.RETRIES.record(endpoint=claim.endpoint, stage=metrics.at_work or "none", reason=type(error).__name__)
        again = partial(claims.requeue, claim, error.message, counted=True, wait_s=wait_s, lost_in=lost_in, retries=retries)
        await self._close(claim, metrics, "retried", again)

    async def _reported(self, claim: Claim, metrics: AttemptMetrics, watchdog: Watchdog) -> dict[str, Any]:
        """Renders the job and writes the stages' notes to its log; returns its output."""
        async with JobLog(self.store.claims, claim) as job_log:
            return await self._render(claim, metrics, watchdog, job_log)

    async def _render(self, claim: Claim, metrics: AttemptMetrics, watchdog: Watchdog, job_log: JobLog) -> dict[str, Any]:
        """Calls the stages, stores the file and returns the job's output. metrics: is filled."""

        def notes_of(stage: Stage) -> OnNote:
            async def on_note(item: Started | Note) -> None:
                watchdog.working()
                metrics.working(stage)
                if isinstance(item, Note):
                    job_log.note(item)

            return on_note

        def product_of(stage: Stage, done: Done[T]) -> T:
            watchdog.waiting()
            job_log.stage_ended()
            metrics.done(stage, done)
            self.rooms[claim.endpoint].learn(stage, done)
            return done.product

        unread = ENDPOINTS[claim.endpoint].input.unread(claim.input, claim.input_version)
        if unread and not claim.resumes:
            job_log.note(Note(unread, "WARN"))
        stages = self.stages[claim.endpoint]
        checkpoint = CheckpointRef(claim.checkpoint, claim.resumes)
        latents = await stages.saved(checkpoint, notes_of("preprocess")) if checkpoint.used else None
        watchdog.waiting()
        metrics.at_work = None
        if latents is None:
            suspect = "preprocess" in claim.lost_in
            with metrics.call("preprocess"):
                made = await stages.preprocess(claim.input, notes_of("preprocess"), alone=suspect)
                conditioning = product_of("preprocess", made)
            with metrics.call("denoise"):
                denoised = await stages.denoise(conditioning, checkpoint, notes_of("denoise"), priority=claim.priority)
                latents = product_of("denoise", denoised)
        with metrics.call("decode"):
            clip = product_of("decode", await stages.decode(latents, notes_of("decode")))
        metrics.engine = clip.engine
        file = await self.keep_file(claim, clip.mp4)
        video = {"url": file.path, "content_type": "video/mp4", "file_name": "video.mp4", "file_size": file.size}
        output = ENDPOINTS[claim.endpoint].output.model_validate({"video": video, "seed": clip.seed})
        return output.model_dump(mode="json")

    async def keep_file(self, claim: Claim, mp4: bytes) -> StoredFile:
        """Stores what a job has made, for as long and for those readers that its caller wanted."""
        keep_s, access = self.retention.keep_file_s(claim.files_s), claim.files_access
        name = self.files.new_name("video", "video/mp4", keep_s)
        if access is not None:
            name = self.files.new_listed_name("video", "video/mp4")
        if keep_s is not None or access is not None:
            row = (name, keep_s, claim.owner, 0, "video/mp4", access)
            await patiently(lambda: self.store.retention.add_file(*row))
        return await self.files.put("video", mp4, "video/mp4", name)

    async def _renew_lease(
        self, claim: Claim, render: asyncio.Task[Any], watchdog: Watchdog
    ) -> Literal["cancelled", "lost"] | ReelrayError:
        """Renews the lease until the caller cancels, a deadline passes or the lease is lost, then stops the work."""
        reason: Literal["cancelled", "lost"] | ReelrayError | None = None
        async with self.store.watch(claim.job_id) as changes:
            while reason is None:
                try:
                    if await self.store.claims.heartbeat(claim, self.queue.lease_s):
                        reason = "cancelled"
                    elif (reason := watchdog.overdue()) is None:
                        await changes.changed(min(self.queue.lease_s / 3, watchdog.due_in_s()))
                except LeaseLost:
                    reason = "lost"
                except Exception:
                    logger.exception("the lease could not be renewed", extra=_fields(claim, "heartbeat_failed"))
                    await asyncio.sleep(database.OUTAGE_PAUSE_S)
        render.cancel()
        return reason

    async def _close(self, claim: Claim, metrics: AttemptMetrics, outcome: Outcome, write: Callable[[], Awaitable[None]]) -> None:
        """Writes the attempt's outcome, however long the database is away. If it cannot be written, the lease runs out and the
        job is tried again."""
        try:
            await patiently(write)
        except LeaseLost:
            logger.warning("the lease was lost before the outcome was written", extra=_fields(claim, "lease_lost"))
            outcome = "lost"
        except Exception:
            logger.exception("the outcome of an attempt was not written", extra=_fields(claim, "close_failed"))
            outcome = "lost"
        metrics.ended(outcome)


def _fields(claim: Claim, action: str) -> dict[str, Any]:
    return {"action": action, "job_id": str(claim.job_id), "attempt": claim.attempt}
