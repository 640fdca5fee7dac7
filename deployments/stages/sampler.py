"""Drives jobs from noise to latents: their order, steps, checkpoints and cancels. Denoise replicas run their units.

It needs no GPU. Each job's loop runs in a thread of its own (`engines/<model>/sampler.py`) and asks `unit_pool.py` for units. A
job's progress is stored as a checkpoint, so that a later attempt need not repeat it.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from typing import Any

from deployments import tracing
from deployments.files.checkpoints import Checkpoints, Saving
from deployments.schemas.endpoint import ENDPOINTS
from deployments.stages.protocol import CheckpointRef, Done, Note, Replicas, Started, Stream
from deployments.stages.threaded import InThread
from deployments.stages.unit_pool import PooledJob, UnitPool
from engines.errors import Cancelled, RunnerDisconnected
from engines.registry import build_stage
from engines.spec import Conditioning, Latents, OnProgress, ShouldStop

logger = logging.getLogger(__name__)


class Sampler:
    """A model's jobs. config: the model's. files_url: of the file store. checkpoint_s: seconds between two checkpoints."""

    def __init__(self, model: str, config: Any, files_url: str, checkpoint_s: float, replicas: Replicas):
        self.sampler = build_stage(model, "sampler", config)
        self.checkpoints = Checkpoints(files_url, config)
        self.checkpoint_s = checkpoint_s
        self.pool = UnitPool(replicas, endpoint=next((each.id for each in ENDPOINTS.values() if each.model == model), ""))
        self.on_gpu = config.on_gpu
        self._calls: dict[str, tuple[PooledJob, asyncio.Event]] = {}

    async def run(
        self, conditioning: Conditioning, reference: Any, checkpoint: CheckpointRef, priority: int = 0
    ) -> Stream[Latents]:
        """Notes of its progress, then the latents, which by then are stored as the job's checkpoint.

        reference: to the conditioning, for the replicas. priority: a lower one comes first.

        A step of other engines than the replicas' is not resumed from. Where engines were mixed even so, because one failed at
        some calls of this attempt or of the one that it resumes, a WARN says it: the result is no longer that of one arithmetic.

        If cancelled, the replicas are free when their running calls of a net have ended, and this returns when the last step is
        stored.
        """
        name, arithmetic = checkpoint.name, await self.pool.arithmetic()
        async with self._job(name, reference, priority) as job:
            resume = await self.checkpoints.step(name, conditioning, arithmetic) if checkpoint.used else None

            def sample(tell: OnProgress, _: ShouldStop) -> Latents:
                return self.sampler.sample(conditioning, job, resume=resume, on_step=saving.offer, on_progress=tell)

            async with Saving(self.checkpoints, name, conditioning, arithmetic, self.checkpoint_s) as saving:
                async with InThread("denoise", sample) as work:
                    with closing(job):  # before the thread is waited for
                        work.ended.add_done_callback(lambda _: job.begun.set())
                        await job.begun.wait()
                        begun_at = time.monotonic()
                        yield Started()
                        if resume is not None:
                            yield Note(f"resumed at step {resume.step}/{resume.steps}")
                        saving.begin()
                        async for note in work:
                            yield note
                seconds = time.monotonic() - begun_at
                if (mixed := _mixed(work.product.engine)) is not None:
                    logger.warning(mixed, extra={"action": "engines_mixed", "file": name})
                    yield Note(mixed, "WARN")
                await saving.finish(work.product)
        replicas = sum(worker.units > 0 for worker in job.workers.values())
        receipt = {"units": job.units, "replicas": replicas, "replica_seconds": round(job.busy_s, 6)}
        yield Done(work.product, seconds, job.busy_s * self.on_gpu, receipt, job.busy_s, job.width)

    @asynccontextmanager
    async def _job(self, name: str, reference: Any, priority: int) -> AsyncIterator[PooledJob]:
        """A job in the pool. An earlier attempt at it that still runs here, because its dispatcher has died, is ended first.

        The job's trace gets a span, and in it one for each replica that has worked for it: a job may have hundreds of units.
        """
        while earlier := self._calls.get(name):
            earlier[0].close()
            await earlier[1].wait()
        with tracing.span_beside("sample", tracing.current(), endpoint=self.pool.endpoint) as span:
            job, over = self.pool.job(reference, priority, span.traceparent), asyncio.Event()
            self._calls[name] = job, over
            try:
                yield job
            except Cancelled:  # by a later attempt
                raise RunnerDisconnected from None
            finally:
                job.close()
                del self._calls[name]
                over.set()
                span.tell(units=job.units, busy_s=job.busy_s, replicas=len(job.workers))
                for replica, each in job.workers.items():
                    span.contains("units", each.began, each.ended, replica=replica, units=each.units, busy_s=each.busy_s)


def _mixed(engine: str) -> str | None:
    """A line for the log if several engines ran a job's steps. engine: what ran them, see `Latents`."""
    ran = engine.split("+")
    return f"steps were run by {' and '.join(ran)}: the same request may give other bits another time" if len(ran) > 1 else None
