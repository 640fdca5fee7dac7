"""A dispatcher and a courier in their own process, as in a replica of `deployments.app`, calling `tests.chaos.stage`.

    python -m tests.chaos.dispatcher CONFIG --sockets FOLDER --trace FOLDER

It records which attempts it runs and which replicas it calls for them, so that a killed process can be traced to the attempts
that died with it. Only `SocketStages`, in place of `ServeStages`, is not the product's.
"""

import argparse
import asyncio
import json
import logging
import os
import random
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from deployments.dispatch.dispatcher import Dispatcher
from deployments.files.file_store import FileStore
from deployments.hosting.embedded_postgres import database_url
from deployments.hosting.logs import configure_logging
from deployments.jobs.database import StoreAway
from deployments.jobs.job import Claim
from deployments.jobs.store import JobStore
from deployments.settings import Settings, load_settings
from deployments.stages.protocol import CheckpointRef, Done, Note, OnNote
from deployments.webhooks import courier
from deployments.webhooks.outbox import Outbox
from engines.errors import RunnerDisconnected
from engines.spec import Clip
from tests.chaos.system import ENDPOINT, NO_DATABASE
from tests.deployments.webhooks.receiver import courier_of

_claim: ContextVar[Claim] = ContextVar("claim")


class Trace:
    """A file that holds whole lines only, even after a SIGKILL."""

    def __init__(self, folder: Path):
        self.file = os.open(folder / f"{os.getpid()}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(self, pid: int) -> None:
        """Records that the current attempt depends on process `pid` from now on."""
        claim = _claim.get()
        line = {"at": time.time(), "job": str(claim.job_id), "attempt": claim.attempt, "pid": pid}
        os.write(self.file, json.dumps(line).encode() + b"\n")


class SocketStages:
    """Calls any replica for any stage. Like `ServeStages`, it does not repeat a call that a replica has accepted."""

    def __init__(self, sockets: Path, trace: Trace):
        self.sockets = sockets
        self.trace = trace

    async def preprocess(self, job_input: dict[str, Any], on_note: OnNote, *, alone: bool = False) -> Done[Any]:
        return await self._call("preprocess", job_input, on_note)

    async def denoise(self, conditioning: Any, checkpoint: CheckpointRef, on_note: OnNote, *, priority: int = 0) -> Done[Any]:
        return await self._call("denoise", conditioning, on_note)

    async def saved(self, checkpoint: CheckpointRef, on_note: OnNote) -> None:
        """These stages keep nothing."""

    async def decode(self, latents: Any, on_note: OnNote) -> Done[Clip]:
        done = await self._call("decode", latents, on_note)
        return Done(Clip(done.product["mp4"].encode(), 16, 64, 64, 8, done.product["seed"]), done.seconds)

    def watch_replicas(self, changed: Callable[[int], None]) -> None:
        changed(len(list(self.sockets.glob("*.sock"))))

    async def _call(self, stage: str, given: Any, on_note: OnNote) -> Done[Any]:
        reader, writer = await self._connected()
        try:
            writer.write(json.dumps({"stage": stage, "given": given}).encode() + b"\n")
            while line := await reader.readline():
                said = json.loads(line)
                if "done" in said:
                    return Done(said["product"], said["done"])
                await on_note(Note(said["note"]))
        except (ConnectionError, json.JSONDecodeError) as exc:
            raise RunnerDisconnected from exc
        finally:
            writer.close()
        raise RunnerDisconnected

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        replicas = list(self.sockets.glob("*.sock"))
        for path in random.sample(replicas, len(replicas)):
            with suppress(OSError):  # the socket of a dead replica
                reader, writer = await asyncio.open_unix_connection(path)
                credentials = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                self.trace.note(struct.unpack("3i", credentials)[0])
                return reader, writer
        raise RunnerDisconnected


class TracedDispatcher(Dispatcher):
    """Each job has its own task, so `_claim` is the job's own."""

    def __init__(self, trace: Trace, *args: Any):
        super().__init__(*args)
        self.trace = trace

    async def _work(self, claim: Claim) -> None:
        _claim.set(claim)
        self.trace.note(os.getpid())
        await super()._work(claim)


async def run(settings: Settings, sockets: Path, trace: Trace) -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        store = await JobStore.open(await asyncio.to_thread(database_url, settings))
    except (StoreAway, RuntimeError):  # as when a replica's health check fails: Serve then starts another
        logging.getLogger("deployments").exception("no database")
        sys.exit(NO_DATABASE)
    try:
        stages = {ENDPOINT: SocketStages(sockets, trace)}
        files = FileStore(settings.files_url)
        dispatcher = TracedDispatcher(trace, store, files, stages, settings.queue, settings.retention)
        async with asyncio.TaskGroup() as group:
            group.create_task(dispatcher.run())
            group.create_task(courier_of(Outbox(store.database), settings).run())
    finally:
        await store.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("--sockets", type=Path, required=True)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--webhook-lease-s", type=float, default=courier.LEASE_S)
    parser.add_argument("--webhook-retry-s", type=float, default=courier.FIRST_RETRY_S)
    asked = parser.parse_args()
    configure_logging()
    courier.LEASE_S, courier.FIRST_RETRY_S = asked.webhook_lease_s, asked.webhook_retry_s
    with suppress(asyncio.CancelledError):
        asyncio.run(run(load_settings(asked.config), asked.sockets, Trace(asked.trace)))


if __name__ == "__main__":
    main()
