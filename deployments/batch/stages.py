"""The three stages of a run, each with its model in one process. They take a row and what has been made of it so far.

An error ends its row only: from then on the row is passed through. Retries are those of the service, `jobs/retry.py`.
"""

import asyncio
import itertools
import logging
import os
import random
import time
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from deployments.batch.contact_sheet import first_frame
from deployments.batch.records import Record, frame_of, publish, write_record
from deployments.batch.run_folder import Row, RunFolder
from deployments.jobs.retry import next_attempt_in
from deployments.stages import device_memory
from deployments.stages.protocol import Done, Note, Stream
from engines import registry
from engines.checkpoints.provenance import options_of, weights_of
from engines.errors import ReelrayError, RunnerDisconnected, RunnerFailed, RunnerOutOfMemory, StorageFailed

logger = logging.getLogger(__name__)

StageName = Literal["preprocess", "denoise", "decode"]


@dataclass(frozen=True)
class Work:
    """A row on its way. product: of the last stage. record: once the row has ended."""

    row: Row
    product: Any = None
    seconds: dict[str, float] = field(default_factory=dict)
    gpu_seconds: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    record: Record | None = None


class RowStage:
    """url: of the run's folder."""

    name: StageName
    stage: Any

    def __init__(self, url: str):
        self.folder = RunFolder(url)
        self.run = self.folder.run()
        endpoint, settings = self.run.described, self.run.loaded_settings()
        if settings.wants_demo_weights(endpoint):
            registry.write_demo_weights(endpoint.model, settings.demo_weights / endpoint.family)
        self.config = settings.model_configs()[endpoint.model]
        self.max_attempts = settings.queue.max_attempts
        self.load()

    def load(self) -> None:
        """Loads what the stage computes with."""
        self.stage = registry.build_stage(self.run.described.model, self.name, self.config)

    def __call__(self, work: Work) -> Work:
        """The stage's part of a row. Raises nothing."""
        if work.record is not None:
            return work
        try:
            return self._attempts(work)
        except ReelrayError as exc:
            error = exc
        except Exception:
            logger.exception("a row failed", extra={"action": "row_failed", "row": work.row.id})
            error = RunnerFailed()
        record = replace(Record.of_error(work.row, error), seconds=work.seconds, warnings=work.warnings)
        try:
            write_record(self.folder, work.row, record)
        except StorageFailed:  # the run tells of it, and a later one renders the row again
            logger.exception("a record could not be written", extra={"action": "record_lost", "row": work.row.id})
        return replace(work, product=None, record=record)

    def _attempts(self, work: Work) -> Work:
        losses = 0
        for attempt in itertools.count(1):
            began = time.monotonic()
            try:
                done = self.work(work)
                seconds = round(time.monotonic() - began, 6)
                gpu = {self.name: seconds} if self.config.on_gpu else {}
                done = replace(done, seconds=work.seconds | {self.name: seconds}, gpu_seconds=work.gpu_seconds | gpu)
                return self.finish(done)
            except RunnerDisconnected:
                os._exit(1)  # the device failed its proof: another process gets the row
            except ReelrayError as exc:
                is_loss = isinstance(exc, RunnerOutOfMemory)
                losses += is_loss
                wait_s = next_attempt_in(exc, attempt, self.max_attempts, losses * is_loss, random.random())
                if wait_s is None:
                    raise
                time.sleep(wait_s)
        raise AssertionError

    def work(self, work: Work) -> Work:
        """One attempt. Raises `ReelrayError`."""
        raise NotImplementedError

    def finish(self, work: Work) -> Work:
        """What follows once its seconds are known; part of the attempt."""
        return work


class Preprocess(RowStage):
    """Fetches a row's files and encodes them, as in the service."""

    name = "preprocess"

    def load(self) -> None:
        """See `RowStage`."""
        from deployments.stages.preprocess import Preprocess as Stage

        settings = self.run.loaded_settings()
        self.service = Stage(self.run.described, self.config, settings.fetch, self.folder.url)
        self.loop = asyncio.Runner()

    def work(self, work: Work) -> Work:
        """See `RowStage`."""
        return self.loop.run(self._encoded(work, self.service.run(work.row.input)))

    async def _encoded(self, work: Work, stream: Stream[Any]) -> Work:
        warnings: list[str] = []
        product = None
        async for item in stream:
            if isinstance(item, Note) and item.level == "WARN":
                warnings.append(item.message)
            elif isinstance(item, Done):
                product = item.product
        return replace(work, product=product, warnings=tuple(warnings))


class Denoise(RowStage):
    """All units of a row in this process, one after the other: the same bits as over many."""

    name = "denoise"

    def work(self, work: Work) -> Work:
        """See `RowStage`."""
        with device_memory.proving():
            return replace(work, product=self.stage.sample(work.product))


class Decode(RowStage):
    """Decodes, encodes and publishes a row's video."""

    name = "decode"

    def load(self) -> None:
        """See `RowStage`."""
        super().load()
        self.receipt = {"weights": weights_of(self.config), "options": options_of(self.config)}

    def work(self, work: Work) -> Work:
        """See `RowStage`."""
        with device_memory.proving():
            return replace(work, product=self.stage.decode(work.product))

    def finish(self, work: Work) -> Work:
        """See `RowStage`."""
        clip = work.product
        receipt = {"engine": clip.engine, "seconds": work.seconds, "gpu_seconds": work.gpu_seconds, **self.receipt}
        if self.run.contact_sheet:
            self.folder.write(frame_of(work.row.id), first_frame(clip.mp4))
        record = publish(self.folder, work.row, clip, work.seconds, receipt)
        return replace(work, product=None, record=record)


STAGES: tuple[type[RowStage], ...] = (Preprocess, Denoise, Decode)
