"""A job's progress, stored by the stage that works on it, for the next attempt to go on from.

Nothing here fails a job. If a file cannot be written or used, the operator gets a warning and the work is done again.
"""

import asyncio
import logging
from collections.abc import Callable
from functools import cache
from math import inf
from time import monotonic
from types import TracebackType
from typing import Any, Self, TypeVar

from deployments.files.file_store import FileStore, Part
from engines.checkpoints.checkpoint_file import pack, unpack
from engines.checkpoints.fingerprint import fingerprint_of
from engines.errors import Cancelled
from engines.spec import Checkpoint, Conditioning, Latents

logger = logging.getLogger(__name__)

WRITE_TIMEOUT_S = 30.0
"""How long a job waits for a write of its own. A bucket that does not answer delays a finished job by twice this at most."""

T = TypeVar("T", bound=Checkpoint | Latents)


class Checkpoints:
    """The checkpoints of one model's jobs. config: the model's; checkpoints made with another config or weights are not used.

    Neither are steps of another arithmetic, e.g. another engine's: the result would have other bits than that of an uninterrupted
    run.
    """

    def __init__(self, files_url: str, config: Any):
        self._files = FileStore(files_url)
        self._model = fingerprint_of(config)

    async def latents(self, name: str) -> Latents | None:
        """The job's finished latents, if there are any."""
        return await self._read(name, "latents", Latents, lambda: self.of_latents(name))

    async def step(self, name: str, conditioning: Conditioning, arithmetic: str) -> Checkpoint | None:
        """The last step that was stored, if it was computed from the same conditioning in the same arithmetic."""
        return await self._read(name, "step", Checkpoint, lambda: self.of_steps(name, conditioning, arithmetic))

    async def write(self, name: str, value: Checkpoint | Latents, fingerprint: Callable[[], str]) -> None:
        """Stores `value` in place of the previous step or latents. fingerprint: called in a thread, as it may hash a video."""
        try:
            data = await asyncio.to_thread(lambda: pack(value, fingerprint()))
            await self._files.put_checkpoint(name, "step" if isinstance(value, Checkpoint) else "latents", data)
        except Exception:
            logger.warning("checkpoint not written", exc_info=True, extra={"action": "checkpoint_failed", "file": name})

    def of_latents(self, name: str) -> str:
        """The fingerprint of finished latents, which can be decoded without the conditioning."""
        return fingerprint_of(name, self._model)

    def of_steps(self, name: str, conditioning: Conditioning, arithmetic: str) -> str:
        """The fingerprint of a step. Hashes the conditioning, which takes some tenths of a second for a long video."""
        return fingerprint_of(name, self._model, arithmetic, conditioning)

    async def _read(self, name: str, part: Part, kind: type[T], fingerprint: Callable[[], str]) -> T | None:
        try:
            data = await self._files.get_checkpoint(name, part)
            return None if data is None else await asyncio.to_thread(lambda: unpack(data, kind, fingerprint()))
        except Exception:
            logger.warning("checkpoint not used", exc_info=True, extra={"action": "checkpoint_unusable", "file": name})
            return None


class Saving:
    """Stores one call's progress while it works: a step at most every `every_s` seconds, and the finished latents.

    At its end, `async with` waits for the write that is under way. After a cancel it also writes the newest step: perhaps this
    replica is shutting down, and the job will go on elsewhere. A write that stalls cannot be taken back, only left alone; nothing
    is written while it lives, because it could replace that later.
    """

    def __init__(self, checkpoints: Checkpoints, name: str, conditioning: Conditioning, arithmetic: str, every_s: float):
        self._checkpoints = checkpoints
        self._name = name
        self._of_steps = cache(lambda: checkpoints.of_steps(name, conditioning, arithmetic))
        self._every_s = every_s
        self._newest: Checkpoint | None = None  # not being written yet
        self._writing: asyncio.Task[None] | None = None
        self._stalled = False
        self._due = inf

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        return self

    def begin(self) -> None:
        """To be called when the work begins: the time until the first checkpoint counts from here."""
        self._due = monotonic() + self._every_s

    def offer(self, step: Checkpoint) -> None:
        """Takes a step that is done. Called from the thread that computed it."""
        self._loop.call_soon_threadsafe(self._offered, step)

    async def finish(self, latents: Latents) -> None:
        """Stores the finished latents."""
        if await self._written():
            self._newest = None
            self._write(latents, lambda: self._checkpoints.of_latents(self._name))
            await self._written()

    async def __aexit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        over = await self._written()
        if over and self._newest and exc_type and issubclass(exc_type, asyncio.CancelledError | GeneratorExit | Cancelled):
            self._write(self._newest, self._of_steps)
            await self._written()

    def _offered(self, step: Checkpoint) -> None:
        self._newest = step
        if monotonic() >= self._due and (self._writing is None or self._writing.done()):
            self._write(step, self._of_steps)
            self._newest = None
            self.begin()

    def _write(self, value: Checkpoint | Latents, fingerprint: Callable[[], str]) -> None:
        self._writing = self._loop.create_task(self._checkpoints.write(self._name, value, fingerprint))

    async def _written(self) -> bool:
        """Waits for the write that is under way. False: it stalls, and is not waited for again."""
        if self._writing is not None and not self._stalled:
            # not for the task itself: a cancel of ours must not end the write
            _, pending = await asyncio.wait([self._writing], timeout=WRITE_TIMEOUT_S)
            if pending:
                self._stalled = True
                logger.warning("checkpoint write stalls", extra={"action": "checkpoint_stalled", "file": self._name})
        return not self._stalled
