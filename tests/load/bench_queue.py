"""The queue under load: submits, claims and status reads a second, with 1,000 and with 1,000,000 jobs waiting.

Each kind of hosting first answers a constant and then the real requests, to the same client over the same connections, so
that the ratio of both rates is the cost of the queue. The client, the host and PostgreSQL share the machine. Hosting: `reelray
gateway`'s uvicorn with one worker, Serve's own proxy, and Serve with HAProxy. Claims are made by eight tasks at once, in the
store and without HTTP. Times are those of whole requests in ms.

What an index costs that only the history reads: jobs are submitted, claimed and ended, by eight tasks in the store, alternately
with the index and without it.
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from uuid import UUID

import asyncpg
from rich.table import Table

from deployments.hosting.embedded_postgres import database_url
from deployments.hosting.haproxy import SWITCH
from deployments.jobs.job import NewJob
from deployments.jobs.store import JobStore
from deployments.settings import Settings
from tests.conftest import embedded
from tests.load.hosting import hosted
from tests.load.report import Report, percentile, table

ENDPOINT = "fal-ai/animatediff-sparsectrl-lcm"
BODY = json.dumps({"prompt": "a red ball", "seed": 1}).encode()
CONNECTIONS = 16
CLAIMERS = 8
ROUNDS = 7
HISTORY_ENDPOINT = "fal-ai/controlnext"
"""No other jobs of it are waiting."""
HOSTS = ("uvicorn", "Serve", "Serve with HAProxy")


@dataclass(frozen=True)
class Rate:
    """per_s: answers a second. p50, p99: in seconds."""

    per_s: float
    p50: float
    p99: float

    @classmethod
    def of(cls, latencies: Sequence[float], seconds: float) -> "Rate":
        return cls(len(latencies) / seconds, percentile(latencies, 50), percentile(latencies, 99))


async def ask(port: int, requests: Callable[[], bytes], seconds: float) -> Rate:
    """`CONNECTIONS` callers; each sends its next request once it is answered. requests: returns the next request's bytes."""
    latencies: list[float] = []
    end = time.perf_counter() + seconds

    async def call() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while (began := time.perf_counter()) < end:
            writer.write(requests())
            try:
                await answer(reader)
            except (asyncio.IncompleteReadError, ConnectionError):  # servers may hang up between two requests
                writer.close()
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                continue
            latencies.append(time.perf_counter() - began)
        writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(call() for _ in range(CONNECTIONS)))
    return Rate.of(latencies, time.perf_counter() - began)


async def answer(reader: asyncio.StreamReader) -> None:
    """Reads one whole answer. Raises `AssertionError` for any but a success."""
    head = await reader.readuntil(b"\r\n\r\n")
    fields = dict(line.split(b": ", 1) for line in head.lower().split(b"\r\n")[1:] if line)
    await reader.readexactly(int(fields[b"content-length"]))
    assert head[9:12] in (b"200", b"202"), head


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode()


def post(path: str) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: {len(BODY)}\r\n\r\n"
    return head.encode() + BODY


async def claims(settings: Settings, seconds: float) -> Rate:
    """Claims a second. The jobs are not run, and are queued again at the end."""
    store = await JobStore.open(database_url(settings), max_connections=CLAIMERS)
    latencies: list[float] = []
    taken = []
    end = time.perf_counter() + seconds

    async def claim() -> None:
        while (began := time.perf_counter()) < end:
            taken.append(await store.claims.take([ENDPOINT], 600))
            latencies.append(time.perf_counter() - began)

    began = time.perf_counter()
    try:
        await asyncio.gather(*(claim() for _ in range(CLAIMERS)))
        rate = Rate.of(latencies, time.perf_counter() - began)
        for job in taken:
            if job is not None:
                await store.claims.requeue(job, "only counted", counted=False)
    finally:
        await store.close()
    return rate


async def whole_jobs(store: JobStore, seconds: float) -> float:
    """Jobs a second that are submitted, claimed and ended, all of one key, as its history would list them."""
    done = 0
    end = time.perf_counter() + seconds

    async def work() -> None:
        nonlocal done
        while time.perf_counter() < end:
            await store.submit(NewJob(HISTORY_ENDPOINT, {"prompt": "a red ball", "seed": 1}, owner="studio"))
            claim = await store.claims.take([HISTORY_ENDPOINT], 600)
            assert claim is not None
            await store.claims.succeed(claim, {"video": {"url": "/files/x/video.mp4"}}, {})
            done += 1

    began = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(CLAIMERS)))
    return done / (time.perf_counter() - began)


async def history_cost(settings: Settings, seconds: float) -> tuple[float, float]:
    """Whole jobs a second with the index of the history and without it, each the median of `ROUNDS` rounds in turn."""
    store = await JobStore.open(database_url(settings), max_connections=CLAIMERS)
    sql = await asyncpg.connect(database_url(settings))
    rates: dict[bool, list[float]] = {True: [], False: []}
    try:
        (index,) = await sql.fetchrow("SELECT pg_get_indexdef('jobs_history'::regclass)")
        await whole_jobs(store, seconds / ROUNDS)  # warms up
        for _ in range(ROUNDS):
            for there in (True, False):
                await sql.execute("DROP INDEX IF EXISTS jobs_history")
                if there:
                    await sql.execute(index)
                await sql.execute("CHECKPOINT")
                rates[there].append(await whole_jobs(store, seconds / ROUNDS))
        await sql.execute(index)
    finally:
        await sql.close()
        await store.close()
    return statistics.median(rates[True]), statistics.median(rates[False])


async def fill(settings: Settings, waiting: int) -> None:
    """Adds jobs until `waiting` are queued. Triggers are off, because event rows are not measured."""
    sql = await asyncpg.connect(database_url(settings))
    try:
        there: int = await sql.fetchval("SELECT count(*) FROM jobs WHERE state = 'queued'")
        await sql.execute("ALTER TABLE jobs DISABLE TRIGGER USER")
        await sql.execute(
            "INSERT INTO jobs (id, endpoint, owner, priority, input, max_attempts, state, turn) "
            "SELECT gen_random_uuid(), $1, NULL, 0, $2::json, 10, 'queued', n "
            "FROM generate_series($3::bigint, $4::bigint) AS n",
            *(ENDPOINT, BODY.decode(), there + 1, waiting),
            timeout=600,
        )
        await sql.execute("ALTER TABLE jobs ENABLE TRIGGER USER")
        await sql.execute("VACUUM ANALYZE jobs", timeout=600)
    finally:
        await sql.close()


async def some_waiting(settings: Settings, count: int = 1000) -> list[UUID]:
    """Jobs from random positions of the queue."""
    sql = await asyncpg.connect(database_url(settings))
    try:
        rows = await sql.fetch("SELECT id FROM jobs WHERE state = 'queued' ORDER BY md5(id::text) LIMIT $1", count, timeout=600)
    finally:
        await sql.close()
    return [row["id"] for row in rows]


@contextmanager
def hosted_by(host: str, settings: Settings) -> Iterator[int]:
    """Hosts the app in this way. Gives its port."""
    application = {
        "name": "reelray",
        "route_prefix": "/",
        "import_path": "tests.load.constant:build",
        "logging_config": {"enable_access_log": False},
        "args": {"home": str(settings.home)},
        "deployments": [{"name": "ingress", "max_ongoing_requests": 5000, "ray_actor_options": {"num_cpus": 0.1}}],
    }
    config = {"proxy_location": "HeadOnly", "http_options": {"host": "127.0.0.1"}, "applications": [application]}
    switch = {SWITCH: "1" if host == "Serve with HAProxy" else "0"}
    with hosted("tests.load.constant:app" if host == "uvicorn" else "serve", config, **switch) as (port, _):
        yield port


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--waiting", type=int, nargs="+", default=[1_000, 1_000_000])
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    asked = parser.parse_args()
    report = Report("queue", "The queue under load", __doc__)
    report.add(
        "Ratios are to the constant under uvicorn, of the same method. Targets: status reads at least 0.5, submits at least "
        "0.3, hosted in Serve with HAProxy at least 0.15; from 1,000 to 1,000,000 waiting no more than 1.5 times the time."
    )
    with embedded() as settings:
        settings.home.mkdir(parents=True, exist_ok=True)
        asyncio.run(migrated(settings))
        shown = table(
            f"{asked.seconds:g} s each, {CONNECTIONS} connections", "what", "a second", "of uvicorn's constant", "p50", "p99"
        )
        reference: dict[str, float] = {}
        for waiting in asked.waiting:
            asyncio.run(fill(settings, waiting))
            ids = [str(each) for each in asyncio.run(some_waiting(settings))]
            for host in HOSTS:
                with hosted_by(host, settings) as port, report.console.status(f"{waiting:,} waiting, {host}"):
                    measure(shown, reference, f"{waiting:,} waiting, {host}", port, ids, asked.seconds)
            rate = asyncio.run(claims(settings, asked.seconds))
            shown.add_row(f"{waiting:,} waiting, claims (no HTTP)", f"{rate.per_s:.0f}", "", *times(rate))
        report.add(shown)
        cost = table(
            f"{ROUNDS} rounds of {asked.seconds / ROUNDS:.1f} s each way, in turn", "index", "whole jobs a second", "ratio"
        )
        with_index, without = asyncio.run(history_cost(settings, asked.seconds))
        cost.add_row("without", f"{without:.0f}", "1.00")
        cost.add_row("with", f"{with_index:.0f}", f"{with_index / without:.2f}")
        report.add(cost)
    report.save()


def measure(shown: Table, reference: dict[str, float], label: str, port: int, ids: list[str], seconds: float) -> None:
    turn = iter(range(1 << 62))
    kinds: dict[str, tuple[str, Callable[[], bytes]]] = {
        "constant, GET": ("GET", lambda: get("/constant")),
        "status": ("GET", lambda: get(f"/queue/{ENDPOINT}/requests/{ids[next(turn) % len(ids)]}/status?logs=1")),
        "constant, POST": ("POST", lambda: post("/constant")),
        "submit": ("POST", lambda: post(f"/queue/{ENDPOINT}")),
    }
    for kind, (method, requests) in kinds.items():
        asyncio.run(ask(port, requests, 1.0))  # warms up
        rate = asyncio.run(ask(port, requests, seconds))
        base = reference.setdefault(method, rate.per_s)  # uvicorn's constant is measured first, so it is the base
        shown.add_row(f"{label}: {kind}", f"{rate.per_s:.0f}", f"{rate.per_s / base:.2f}", *times(rate))


def times(rate: Rate) -> tuple[str, str]:
    return f"{rate.p50 * 1000:.1f}", f"{rate.p99 * 1000:.1f}"


async def migrated(settings: Settings) -> None:
    await (await JobStore.open(database_url(settings))).close()


if __name__ == "__main__":
    main()
