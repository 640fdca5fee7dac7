"""What uploads and downloads cost a gateway in memory: one of 1 GB, and twenty of 1 GB at once.

Each line is a fresh gateway process with one worker and a local folder. Its memory is the process's largest resident size during
the transfers less that before them, after a small upload and download; the operating system's cache of files is not part of it.
Callers and gateway share the machine, and all files are on one disk.
"""

import argparse
import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import httpx
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from deployments.hosting import gateway
from deployments.hosting.embedded_postgres import database_url
from tests.conftest import embedded
from tests.load.hosting import hosted, with_arguments

PIECE = bytes(range(256)) * 1024
PART_BYTES = 10 << 20
PARTS_AT_ONCE = 10
LIMITS_MB = {1: 64, 20: 256}
"""Transfers at once -> the most memory that they may cost."""


def app() -> FastAPI:
    """A gateway's app with two more routes: GET /peak answers the largest resident size in MB since the last GET /now, which
    answers the present one."""
    made = gateway.app()

    async def peak(request: Request) -> Response:
        return JSONResponse(resident_mb("VmHWM"))

    async def now(request: Request) -> Response:
        forget_peak()
        return JSONResponse(resident_mb("VmRSS"))

    made.router.add_route("/peak", peak)
    made.router.add_route("/now", now)
    return made


def forget_peak() -> None:
    """Sets VmHWM to VmRSS."""
    Path("/proc/self/clear_refs").write_text("5")


def resident_mb(name: str) -> float:
    """A figure of /proc/self/status. getrusage's peak is no use here: a process inherits that of the one that started it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    raise AssertionError(name)


async def initiated(url: str, form: str = "initiate") -> dict[str, str]:
    async with httpx.AsyncClient(timeout=60) as client:
        answer = await client.post(f"{url}/rest/storage/upload/{form}", json={"content_type": "video/mp4", "file_name": "a.mp4"})
    urls: dict[str, str] = answer.raise_for_status().json()
    return urls


async def put(upload_url: str, size: int) -> None:
    """Sends so many bytes, without holding them."""
    parts = urlsplit(upload_url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    head = f"PUT {parts.path}?{parts.query} HTTP/1.1\r\nhost: {parts.netloc}\r\nconnection: close\r\n"
    writer.write(f"{head}content-type: video/mp4\r\ncontent-length: {size}\r\n\r\n".encode())
    for sent in range(0, size, len(PIECE)):
        writer.write(PIECE[: size - sent])
        await writer.drain()
    assert b" 200 " in await reader.readline()
    writer.close()


async def upload(url: str, size: int) -> str:
    """Uploads a file; returns its URL."""
    urls = await initiated(url)
    await put(urls["upload_url"], size)
    return urls["file_url"]


async def upload_in_parts(url: str, size: int) -> str:
    """The same as the Python client does: parts of 10 MiB, ten at once."""
    urls, room = await initiated(url, "initiate-multipart"), asyncio.Semaphore(PARTS_AT_ONCE)
    path, _, query = urls["upload_url"].partition("?")
    async with httpx.AsyncClient(timeout=600) as client:

        async def send(number: int) -> dict[str, Any]:
            async with room:
                length = min(PART_BYTES, size - (number - 1) * PART_BYTES)
                content = (PIECE * (length // len(PIECE) + 1))[:length]
                part: dict[str, Any] = (await client.put(f"{path}/{number}?{query}", content=content)).raise_for_status().json()
                return part

        parts = await asyncio.gather(*(send(number) for number in range(1, -(-size // PART_BYTES) + 1)))
        (await client.post(f"{path}/complete?{query}", json={"parts": parts})).raise_for_status()
    return urls["file_url"]


async def download(file_url: str, size: int) -> None:
    parts = urlsplit(file_url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(f"GET {parts.path} HTTP/1.1\r\nhost: {parts.netloc}\r\nconnection: close\r\n\r\n".encode())
    await reader.readuntil(b"\r\n\r\n")
    received = 0
    while piece := await reader.read(1 << 20):
        received += len(piece)
    assert received == size, received
    writer.close()


Transfer = Callable[[str, int], Coroutine[Any, Any, Any]]


@dataclass(frozen=True)
class Measured:
    """memory_mb: of the process, above what it had before. seconds: for all transfers."""

    memory_mb: float
    seconds: float


async def measure(url: str, transfer: Transfer, size: int, times: int) -> Measured:
    async with httpx.AsyncClient(timeout=60) as client:
        await download(await upload(url, len(PIECE)), len(PIECE))
        target = await upload(url, size) if transfer is download else url
        before: float = (await client.get(f"{url}/now")).json()
        began = time.perf_counter()
        await asyncio.gather(*(transfer(target, size) for _ in range(times)))
        seconds = time.perf_counter() - began
        after: float = (await client.get(f"{url}/peak")).json()
    return Measured(after - before, seconds)


def main() -> None:
    from tests.load.report import Report, table  # late: it loads torch, which the gateway must not

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size-mb", type=int, default=1000, help="of each file")
    whole = parser.parse_args().size_mb * 1_000_000
    report = Report("transfers", "What transfers cost", "`python -m tests.load.bench_transfers` (`make bench-transfers`)")
    report.add(" ".join((__doc__ or "").split("\n\n", 1)[1].split()))
    report.add(f"Targets: {', '.join(f'{count} at once cost <= {limit} MB' for count, limit in LIMITS_MB.items())}.")
    shown = table("Transfers", "what", "at once", "MB each", "memory, MB", "seconds", "MB/s")
    kinds: dict[str, Transfer] = {"uploads": upload, "uploads in parts, ten at once each": upload_in_parts, "downloads": download}
    missed = []
    with embedded() as settings:
        settings.home.mkdir(parents=True, exist_ok=True)
        database_url(settings)
        for name, transfer in kinds.items():
            for times, limit in LIMITS_MB.items():
                size = whole // 10 if times > 1 and transfer is upload_in_parts else whole  # parts need the disk twice
                with (
                    TemporaryDirectory(prefix="reelray-") as folder,
                    hosted("tests.load.bench_transfers:app", with_arguments(home=str(settings.home), files=folder)) as (port, _),
                    report.console.status(f"{times} {name}"),
                ):
                    done = asyncio.run(measure(f"http://127.0.0.1:{port}", transfer, size, times))
                rate = times * size / 1e6 / done.seconds
                shown.add_row(
                    name, str(times), f"{size / 1e6:.0f}", f"{done.memory_mb:.0f}", f"{done.seconds:.1f}", f"{rate:.0f}"
                )
                if done.memory_mb > limit:
                    missed.append(f"{times} {name}")
    report.add(shown)
    report.add(f"Missed: {', '.join(missed)}." if missed else "All targets are met.")
    report.save()


if __name__ == "__main__":
    main()
