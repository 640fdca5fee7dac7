"""Thousands of callers who wait: open status streams on one gateway process, and the same callers polling.

    python -m tests.load.bench_streams [--streams 10000] [--seconds 60] [--save]

Every stream follows a request of its own. Meanwhile 50 requests a minute change their state: they are claimed, get four log
lines and succeed. The lateness of an event is from the call that changed the state to the event's arrival. Beside the streams one
caller reads the status of random requests twenty times a second. Then callers without streams poll ten times a second each, as
fal's Python client does, more and more of them. Gateway, clients and PostgreSQL share the machine.
"""

import argparse
import asyncio
import json
import random
import re
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from uuid import UUID

from deployments.hosting.embedded_postgres import database_url
from deployments.jobs.job import Claim
from deployments.jobs.store import JobStore
from deployments.settings import Settings
from tests.conftest import embedded
from tests.load.bench_queue import ENDPOINT, answer, fill, get, migrated
from tests.load.hosting import hosted, with_arguments
from tests.load.report import Report, percentile, table

CHANGES_PER_MINUTE = 50
OPENING = 100
"""Streams that are opened at a time."""
READS_PER_S = 20
POLLERS = (50, 100, 200, 400)
POLL_S = 0.1
LATE_S, STREAM_BYTES, READ_S = 1.0, 60_000, 0.05
"""The targets, for the p99 of lateness, the memory of a stream, and the p99 of a status read."""
EVENT = re.compile(rb"data: (\{.*?\})\n\n", re.DOTALL)


class Stream(asyncio.Protocol):
    """One open stream. It notes when each status arrived, and counts everything else."""

    def __init__(self, job_id: UUID, arrivals: dict[tuple[UUID, str], float]):
        self.job_id, self.arrivals = job_id, arrivals
        self.events = 0
        self.begun = asyncio.get_running_loop().create_future()
        self._seen: str | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(get(f"/queue/{ENDPOINT}/requests/{self.job_id}/status/stream"))

    def data_received(self, data: bytes) -> None:
        for found in EVENT.finditer(data):
            self.events += 1
            status = json.loads(found[1])["status"]
            if status != self._seen:
                self._seen = status
                self.arrivals[self.job_id, status] = time.monotonic()
            if not self.begun.done():
                self.begun.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.begun.done():
            self.begun.set_exception(ConnectionError("a stream ended before its first event"))


async def opened(port: int, ids: Sequence[UUID], arrivals: dict[tuple[UUID, str], float]) -> list[Stream]:
    streams: list[Stream] = []
    loop = asyncio.get_running_loop()
    for first in range(0, len(ids), OPENING):
        some = []
        for job_id in ids[first : first + OPENING]:
            _, stream = await loop.create_connection(lambda job_id=job_id: Stream(job_id, arrivals), "127.0.0.1", port)  # type: ignore[misc]
            some.append(stream)
        await asyncio.gather(*(stream.begun for stream in some))
        streams += some
    return streams


async def change_states(store: JobStore, seconds: float, changed: dict[tuple[UUID, str], float]) -> None:
    """Each job that starts and each that ends is a change."""
    held: list[Claim] = []
    end = time.monotonic() + seconds
    while (began := time.monotonic()) < end:
        if len(held) < 3 and (claim := await store.claims.take([ENDPOINT], 600)):
            changed[claim.job_id, "IN_PROGRESS"] = began
            held.append(claim)
            for line in range(4):
                await store.claims.log(claim, f"step {line + 1}/4")
        elif held:
            claim = held.pop(0)
            changed[claim.job_id, "COMPLETED"] = time.monotonic()
            await store.claims.succeed(claim, {"video": {"url": "/files/x/video.mp4"}, "seed": 1}, {"inference_time": 1.0})
        await asyncio.sleep(max(0.0, began + 60 / CHANGES_PER_MINUTE - time.monotonic()))


async def read_statuses(port: int, ids: Sequence[UUID], seconds: float, every_s: float) -> list[float]:
    """One caller. How long each of his reads took."""
    took = []
    end = time.monotonic() + seconds
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while (began := time.monotonic()) < end:
        writer.write(get(f"/queue/{ENDPOINT}/requests/{random.choice(ids)}/status?logs=1"))
        await answer(reader)
        took.append(time.monotonic() - began)
        await asyncio.sleep(max(0.0, began + every_s - time.monotonic()))
    writer.close()
    return took


@asynccontextmanager
async def store_of(settings: Settings) -> AsyncIterator[JobStore]:
    store = await JobStore.open(database_url(settings))
    try:
        yield store
    finally:
        await store.close()


async def measure_streams(settings: Settings, count: int, seconds: float, report: Report) -> list[str]:
    """The targets that were missed."""
    arrivals, changed = dict[tuple[UUID, str], float](), dict[tuple[UUID, str], float]()
    async with store_of(settings) as store:
        ids = [row["id"] for row in await store.database.fetch("SELECT id FROM jobs ORDER BY turn LIMIT $1", count)]
        with hosted("gateway", with_arguments(home=str(settings.home))) as (port, process):
            await read_statuses(port, ids, 1.0, 0.0)
            empty, began = process.memory_info().rss, time.monotonic()
            streams = await opened(port, ids, arrivals)
            opening_s = time.monotonic() - began
            await asyncio.sleep(5.0)
            cpu_before, counted = sum(process.cpu_times()[:2]), sum(stream.events for stream in streams)
            _, took = await asyncio.gather(
                change_states(store, seconds, changed), read_statuses(port, ids, seconds, 1 / READS_PER_S)
            )
            await asyncio.sleep(2.0)
            cpu = (sum(process.cpu_times()[:2]) - cpu_before) / (seconds + 2)
            size = (process.memory_info().rss - empty) / count
            events = sum(stream.events for stream in streams) - counted
            for stream in streams:
                stream.transport.abort()
    late = [arrivals[change] - at for change, at in changed.items() if change in arrivals]
    missing = len(changed) - len(late)
    shown = table(f"{count:,} streams on one gateway process, {seconds:g} s", "what", "p50", "p99", "most", "target, p99")
    shown.add_row(f"lateness of {len(late)} changes of state, ms", *_ms(late), "1000")
    shown.add_row(f"{len(took)} status reads beside them, ms", *_ms(took), "50")
    report.add(shown)
    report.add(
        f"Memory: {size / 1000:.1f} kB a stream (target: at most 60). The gateway took {cpu:.0%} of a core and sent {events:,}"
        f" events, mostly positions that moved. Opening the streams took {opening_s:.0f} s. Changes not told: {missing}."
    )
    return [
        name
        for name, missed in {
            "lateness": percentile(late, 99) > LATE_S,
            "memory": size > STREAM_BYTES,
            "status reads": percentile(took, 99) > READ_S,
            "lost changes": missing > 0,
        }.items()
        if missed
    ]


async def measure_polling(settings: Settings, seconds: float, report: Report) -> None:
    shown = table(
        f"callers that poll ten times a second, {seconds:g} s each",
        "callers",
        "reads a second",
        "of those wanted",
        "p50, ms",
        "p99, ms",
        "of a core",
    )
    async with store_of(settings) as store:
        ids = [row["id"] for row in await store.database.fetch("SELECT id FROM jobs ORDER BY turn LIMIT 1000")]
    with hosted("gateway", with_arguments(home=str(settings.home))) as (port, process):
        for callers in POLLERS:
            before, began = sum(process.cpu_times()[:2]), time.monotonic()
            took = [
                each
                for some in await asyncio.gather(*(read_statuses(port, ids, seconds, POLL_S) for _ in range(callers)))
                for each in some
            ]
            spent_s = time.monotonic() - began
            cpu = (sum(process.cpu_times()[:2]) - before) / spent_s
            share = len(took) / (callers * seconds / POLL_S)
            shown.add_row(str(callers), f"{len(took) / spent_s:.0f}", f"{share:.0%}", *_ms(took)[:2], f"{cpu:.0%}")
            if share < 0.9:
                break
    report.add(shown)


def _ms(seconds: Sequence[float]) -> tuple[str, str, str]:
    return tuple(f"{each * 1000:.0f}" for each in (percentile(seconds, 50), percentile(seconds, 99), max(seconds)))  # type: ignore[return-value]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--save", action="store_true", help="keep the figures")
    asked = parser.parse_args()
    report = Report("streams", "Open status streams", __doc__, "`make bench-streams`")
    with embedded() as settings:
        settings.home.mkdir(parents=True, exist_ok=True)
        asyncio.run(migrated(settings))
        asyncio.run(fill(settings, asked.streams))
        missed = asyncio.run(measure_streams(settings, asked.streams, asked.seconds, report))
        asyncio.run(measure_polling(settings, min(10.0, asked.seconds), report))
    report.add(f"Targets missed: {', '.join(missed) or 'none'}.")
    if asked.save:
        report.save()
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
