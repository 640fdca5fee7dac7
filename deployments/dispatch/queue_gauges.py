"""Sets the metrics that only the database knows: how much waits, and for how long.

Every dispatcher does, with the same values.
"""

import asyncio
import logging
from collections.abc import Collection
from typing import Protocol

from deployments import metrics
from deployments.jobs.store import JobStore
from deployments.jobs.work import StageStatus, stages

logger = logging.getLogger(__name__)

FRESH_S = 60.0
"""What the autoscaling wrote longer ago is not shown: it may have ended."""
INTERVAL_S = 10.0
"""Counting a million queued jobs takes 50 ms, and Ray sends metrics on every ten seconds."""


class Webhooks(Protocol):
    """The webhooks that wait; see `Outbox.backlog`."""

    async def backlog(self) -> tuple[int, float]:
        """How many will still be tried, and for how many seconds the first of them has waited."""
        ...


class QueueGauges:
    """endpoints: those that this service has."""

    def __init__(self, store: JobStore, outbox: Webhooks, endpoints: Collection[str]):
        self.store, self.outbox, self.endpoints = store, outbox, list(endpoints)
        self._targets: dict[tuple[str, str], int] = {}

    async def run(self) -> None:
        """Sets them until cancelled."""
        while True:
            try:
                await self.set()
            except Exception:  # no metric ends a dispatcher
                metrics.DATABASE.record(0)
                logger.exception("the queue was not measured", extra={"action": "gauges_failed"})
            await asyncio.sleep(INTERVAL_S)

    async def set(self) -> None:
        """Sets them once."""
        for queue in await self.store.queue_gauges(self.endpoints):
            metrics.QUEUED.record(queue.queued, endpoint=queue.endpoint)
            metrics.DELAYED.record(queue.delayed, endpoint=queue.endpoint)
            metrics.RUNNING.record(queue.running, endpoint=queue.endpoint)
            metrics.OLDEST.record(queue.oldest_s, endpoint=queue.endpoint)
            metrics.PAUSED.record(queue.paused, endpoint=queue.endpoint)
        written = [each for each in await stages(self.store.database) if each[0].endpoint in self.endpoints]
        for stage, age_s in written:
            if age_s < FRESH_S:
                self._set_stage(stage)
        if written:
            metrics.SCALING_AGE.record(min(age_s for _, age_s in written))
        waiting, oldest_s = await self.outbox.backlog()
        metrics.WEBHOOKS.record(waiting)
        metrics.OLDEST_WEBHOOK.record(oldest_s)
        metrics.DATABASE.record(1)

    def _set_stage(self, stage: StageStatus) -> None:
        at = {"endpoint": stage.endpoint, "stage": stage.stage}
        metrics.BACKLOG.record(stage.backlog_s, **at)
        metrics.TARGET.record(stage.target, **at)
        metrics.REPLICAS.record(stage.replicas, **at)
        metrics.READY.record(stage.ready_s, **at)
        before = self._targets.get((stage.endpoint, stage.stage), stage.target)
        if before != stage.target:
            metrics.SCALINGS.record(1, **at, direction="up" if stage.target > before else "down")
        self._targets[stage.endpoint, stage.stage] = stage.target
