"""Submissions whose answers are lost on the way, which fal's own clients then repeat automatically.

    python -m tests.wire.lost_answers [--jobs 1000] [--save]

A proxy cuts off the first answer to every `Idempotency-Key`, half of them before the first byte and half in the middle. Equal
submissions without the header follow. Clients: fal-client from PyPI, and @fal-ai/client from npm under Node. Behind the proxy
run the real app under uvicorn, and PostgreSQL.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Awaitable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar
from uuid import UUID

import fal_client
import fal_client.client
import httpx

from deployments.hosting.embedded_postgres import database_url
from deployments.ingress.app import create_app
from deployments.jobs.store import JobStore
from deployments.settings import Settings
from tests.conftest import embedded
from tests.load.report import Report, table
from tests.wire.cutting import cutting
from tests.wire.page import PageClient, install_client
from tests.wire.service import ENDPOINT, Wire, listening

TIMEOUT_S = 600
AT_ONCE = 100
"""Concurrent submissions of the Python client. With a thousand its connection pool took minutes; JavaScript's took seconds."""

T = TypeVar("T")


@dataclass(frozen=True)
class Told:
    """The result of `jobs` submissions; number i has seed i. ids: the request ids that callers received, in that order.

    cut: answers that were lost. posts: submissions that arrived.
    """

    ids: list[str]
    cut: int
    posts: int


async def by_python(base_url: str, wire: Wire, jobs: int) -> Told:
    before = wire.count("POST", ENDPOINT)
    async with cutting(base_url) as (url, proxy):
        with python_client(url) as client:
            handles = await some_at_once(
                client.submit(ENDPOINT, {"prompt": "x", "seed": i}, headers={"Idempotency-Key": f"python {i}"})
                for i in range(jobs)
            )
            await (await client._client).aclose()  # it has no public way to be closed
    return Told([handle.request_id for handle in handles], len(proxy.cut), wire.count("POST", ENDPOINT) - before)


async def by_javascript(base_url: str, wire: Wire, jobs: int) -> Told:
    before = wire.count("POST", ENDPOINT)
    async with cutting(base_url) as (url, proxy):
        done = await PageClient(url)(
            "submitAll",
            ENDPOINT,
            timeout_s=TIMEOUT_S,
            submits=[
                {"input": {"prompt": "x", "seed": i}, "headers": {"Idempotency-Key": f"page {i}"}, "priority": "normal"}
                for i in range(jobs)
            ],
        )
    assert done.error is None, done.error
    return Told([answer["request_id"] for answer in done.value], len(proxy.cut), wire.count("POST", ENDPOINT) - before)


async def without_keys(base_url: str, jobs: int) -> list[str]:
    """Makes equal submissions. Returns their ids."""
    with python_client(base_url) as client:
        handles = await some_at_once(client.submit(ENDPOINT, {"prompt": "x", "seed": 1}) for _ in range(jobs))
        await (await client._client).aclose()
    return [handle.request_id for handle in handles]


async def some_at_once(calls: Iterable[Awaitable[T]]) -> list[T]:
    """The results of all the calls, made `AT_ONCE` at a time."""
    room = asyncio.Semaphore(AT_ONCE)

    async def one(call: Awaitable[T]) -> T:
        async with room:
            return await call

    return await asyncio.gather(*(one(call) for call in calls))


@contextmanager
def python_client(base_url: str) -> Iterator[fal_client.AsyncClient]:
    url = fal_client.client.QUEUE_URL_FORMAT
    fal_client.client.QUEUE_URL_FORMAT = f"{base_url}/queue/"
    try:
        yield fal_client.AsyncClient(key="anything")
    finally:
        fal_client.client.QUEUE_URL_FORMAT = url


async def waiting_seeds(store: JobStore) -> dict[UUID, int]:
    """Claims every waiting job. Returns job id -> seed."""
    seeds = {}
    while claim := await store.claims.take([ENDPOINT], TIMEOUT_S):
        seeds[claim.job_id] = claim.input["seed"]
    return seeds


async def seeds_told(store: JobStore, request_ids: list[str]) -> list[int]:
    """The seeds of all waiting jobs, in the order of `request_ids`, which must list all of them."""
    seeds = await waiting_seeds(store)
    assert len(seeds) == len(request_ids)
    return [seeds[UUID(request_id)] for request_id in request_ids]


async def measure(settings: Settings, jobs: int, report: Report) -> list[str]:
    """The promises that were broken."""
    faults = []
    shown = table(f"{jobs:,} submissions", "client", "answers lost", "submits arrived", "jobs", "callers with their own job", "s")
    store = await JobStore.open(database_url(settings))
    wire = Wire(create_app(settings, store))
    async with listening(wire) as url:
        for client, submit in (("Python", by_python), ("JavaScript", by_javascript)):
            began = time.monotonic()
            told = await submit(url, wire, jobs)
            took_s = time.monotonic() - began
            seeds = await waiting_seeds(store)
            own = sum(seeds.get(UUID(request_id)) == i for i, request_id in enumerate(told.ids))
            shown.add_row(client, *(f"{n:,}" for n in (told.cut, told.posts, len(seeds), own)), f"{took_s:.0f}")
            if (told.cut, len(seeds), own) != (jobs, jobs, jobs):
                faults.append(f"{client}: {told.cut} answers lost, {len(seeds)} jobs, {own} callers with their own")
        before = wire.count("POST", ENDPOINT)
        began = time.monotonic()
        ids = await without_keys(url, jobs)
        took_s = time.monotonic() - began
        seeds = await waiting_seeds(store)
        own, posts = len(set(map(UUID, ids)) & seeds.keys()), wire.count("POST", ENDPOINT) - before
        shown.add_row("Python, no key, equal", "0", *(f"{n:,}" for n in (posts, len(seeds), own)), f"{took_s:.0f}")
        if (len(seeds), own) != (jobs, jobs):
            faults.append(f"without keys: {len(seeds)} jobs, {own} callers with a job of their own")
    await store.close()
    report.add(shown)
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--save", action="store_true", help="keep the figures")
    asked = parser.parse_args()
    report = Report("lost_answers", "Answers lost on the way", __doc__, "`make chaos`")
    install_client()
    with embedded() as settings:
        try:
            faults = asyncio.run(measure(settings, asked.jobs, report))
        except (fal_client.FalClientError, httpx.HTTPError, TimeoutError, AssertionError) as exc:
            faults = [f"a client gave up: {exc!r}"]
    return report.conclude(faults, save=asked.save)


if __name__ == "__main__":
    sys.exit(main())
