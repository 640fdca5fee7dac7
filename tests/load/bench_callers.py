"""What one caller can cost a gateway: how long its event loop stands still, and how much memory its process takes.

A gateway with one worker gets the worst bodies that a caller can send. Beside them a task on its event loop sleeps 2 ms again and
again; the longest delay of a wake-up is how long the loop stood still. Other processes on the machine add to it: compare it with
the first line, of small submissions. Memory is the process's largest resident size so far.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from deployments.files.file_store import FileStore
from deployments.hosting import gateway
from deployments.hosting.embedded_postgres import database_url
from deployments.jobs.store import JobStore
from deployments.schemas.inputs import KEPT
from deployments.settings import Settings
from tests.conftest import embedded
from tests.load.hosting import hosted, with_arguments
from tests.load.report import Report, ms, table
from tests.load.standstill import watched

ENDPOINT = "fal-ai/animatediff-sparsectrl-lcm"
SUBMIT = f"/queue/{ENDPOINT}"
PIECE_BYTES = 1 << 18


def app() -> FastAPI:
    """A gateway's app that also measures itself: GET /measured answers the figures since the last time."""
    made = gateway.app()
    lifespan = made.router.lifespan_context

    @asynccontextmanager
    async def measuring(app: FastAPI) -> AsyncIterator[None]:
        async with lifespan(app), watched() as app.state.longest:
            yield

    async def measured(request: Request) -> Response:
        longest = request.app.state.longest
        blocked_s, longest[0] = longest[0], 0.0
        return JSONResponse({"blocked_s": blocked_s, "peak_kb": peak_kb()})

    made.router.lifespan_context = measuring
    made.router.add_route("/measured", measured)
    return made


def peak_kb() -> int:
    """Of this process. `getrusage` would count that of the benchmark, which has forked it, too."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1])


async def send(port: int, body: bytes, number: int) -> int:
    """Submits a body, in pieces, under an idempotency key of its own. Returns the answer's status."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {SUBMIT}?fal_webhook=http://127.0.0.1:1/ HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n"
    writer.write(f"{head}idempotency-key: {number}\r\ncontent-length: {len(body)}\r\n\r\n".encode())
    with suppress(ConnectionError):  # a body that is too large is answered before it has been sent
        for at in range(0, len(body), PIECE_BYTES):
            writer.write(body[at : at + PIECE_BYTES])
            await writer.drain()
    with suppress(ConnectionError):
        status = int((await reader.readline()).split()[1])
        await reader.read()
        writer.close()
        return status
    return 0


def bodies() -> Iterator[tuple[str, bytes, int]]:
    """What is sent, and how often at once."""
    yield "a small submission", b'{"prompt": "a"}', 64
    yield "3.3 MB of 300,000 unknown fields", b"{" + b",".join(b'"k%d":1' % i for i in range(300_000)) + b"}", 1
    fields = {f"{i}": 1 for i in range(15_000)}
    yield "200 kB of 15,000 unknown fields", json.dumps({"prompt": "a"} | fields).encode(), 1
    uri = b'{"prompt": "a", "keyframe_0_index": 0, "keyframe_0_image_url": "data:image/png;base64,%s"}'
    yield "60 MB of a data URI", uri % (b"A" * 60_000_000), 1
    yield "60 MB of a data URI with escapes", uri % (b"\\/AAA\\u002b" * 5_400_000), 1
    yield "60 MB without a quote", b'{"prompt": "' + b"x" * 60_000_000 + b'"}', 1
    yield "60 MB of beginnings of data URIs", b'"data:' * 10_000_000, 1
    yield "60 MB of a data URI, from 64 at once", uri % (b"A" * 60_000_000), 64


async def workers_side(settings: Settings) -> list[tuple[str, float]]:
    """What the same bodies cost a dispatcher, which claims all of their jobs, and a replica, which reads the file of one."""
    url = await asyncio.to_thread(database_url, settings)
    store, files, kept = await JobStore.open(url), FileStore(settings.files_url), ""
    figures, count = [], 0
    async with watched() as longest:
        while claim := await store.claims.take([ENDPOINT], 60.0):
            count += 1
            kept = next((value for value in claim.input.values() if str(value).startswith(KEPT)), kept)
    figures.append((f"a dispatcher claims all {count} jobs", longest[0]))
    with TemporaryDirectory(prefix="reelray-") as folder:
        copy = Path(folder) / "file"
        async with watched() as longest:
            await files.copy(kept.removeprefix(KEPT), copy)
        figures.append((f"a replica reads the file of one, {copy.stat().st_size / 1e6:.0f} MB", longest[0]))
    await store.close()
    return figures


async def measure(port: int, body: bytes, times: int) -> tuple[dict[str, float], float, dict[int, int]]:
    """The gateway's figures, the seconds until the last answer, and the answers' statuses."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        await client.get("/measured")
        began = time.perf_counter()
        statuses = await asyncio.gather(*(send(port, body, time.time_ns() + number) for number in range(times)))
        seconds = time.perf_counter() - began
        figures: dict[str, float] = (await client.get("/measured")).json()
    return figures, seconds, {status: statuses.count(status) for status in set(statuses)}


def main() -> None:
    report = Report("callers", "What one caller can cost", __doc__, "`python -m tests.load.bench_callers` (`make bench-callers`)")
    report.add("Targets: no single request stops the loop for more than 50 ms; 64 at once stay within 1 GB.")
    shown = table("One worker", "what is sent", "answers", "loop stood still, ms", "peak memory, MB", "seconds")
    with embedded() as settings:
        settings.home.mkdir(parents=True, exist_ok=True)
        database_url(settings)
        config = with_arguments(home=str(settings.home), unknown_fields="refuse")
        for name, body, times in bodies():
            with hosted("tests.load.bench_callers:app", config) as (port, _), report.console.status(name):
                figures, seconds, statuses = asyncio.run(measure(port, body, times))
            answers = ", ".join(f"{count} x {status}" for status, count in statuses.items())
            shown.add_row(name, answers, ms(figures["blocked_s"]), f"{figures['peak_kb'] / 1024:.0f}", f"{seconds:.1f}")
        others = table("The same jobs further on", "what is done", "loop stood still, ms")
        for name, blocked_s in asyncio.run(workers_side(settings)):
            others.add_row(name, ms(blocked_s))
    report.add(shown)
    report.add(others)
    report.save()


if __name__ == "__main__":
    main()
