"""Renders rows with Ray Data in laps, each a process of its own (see `ray_data.py`), and finds out which rows a lap has lost."""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, suppress
from dataclasses import asdict
from itertools import islice

from deployments.batch.records import Record, write_record
from deployments.batch.run_folder import Row, RunFolder
from engines.errors import ReelrayError, RunnerDisconnected

LAP, LAP_ROWS = "deployments.batch.ray_data", 2000
"""The module that is run, and the most rows that it is given."""
STOP_S = 10.0
"""How long a lap may take to end when it is told to, in seconds; a Ray job is killed sooner."""
TAIL_CHARS = 2000
MAX_LINE_BYTES = 1 << 20


class LapFailed(ReelrayError):
    """A lap ended before any row had."""


async def in_laps(folder: RunFolder, rows: Iterator[Row]) -> AsyncGenerator[Record, None]:
    """The rows' records as they end. Raises `LapFailed`.

    Rows that are lost with an actor are taken up again at the end, each alone at its actor: it may be their fault. After two more
    losses there, three as in `jobs/retry.py`, they have failed.
    """
    lost: list[Row] = []
    while lap := list(islice(rows, LAP_ROWS)):
        left = {row.id: row for row in lap}
        records = _lap(folder, lap)
        async with aclosing(records):
            async for record in records:
                del left[record.id]
                yield record
        lost.extend(left.values())
    left = {row.id: row for row in lost}
    if lost:
        records = _lap(folder, lost, "--alone")
        async with aclosing(records):
            async for record in records:
                del left[record.id]
                yield record
    for row in left.values():
        record = Record.of_error(row, RunnerDisconnected())
        await asyncio.to_thread(write_record, folder, row, record)
        yield record


async def _lap(folder: RunFolder, rows: list[Row], *options: str) -> AsyncGenerator[Record, None]:
    """The records that one process prints. Raises `LapFailed` if it ends by an error before it has printed one."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", LAP, folder.url, *options),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=MAX_LINE_BYTES,
        start_new_session=True,  # Ctrl-C is for the driver, which then ends the lap
    )
    stdin, stdout, stderr = process.stdin, process.stdout, process.stderr
    assert stdin is not None
    assert stdout is not None
    assert stderr is not None
    tail = asyncio.create_task(_tail(stderr))
    ended = 0
    try:
        with suppress(ConnectionError):  # it has died, which its status says
            for row in rows:
                stdin.write(json.dumps(asdict(row)).encode() + b"\n")
                await stdin.drain()
            stdin.write(b"\n")  # and stays open: it ends when this process does
        async for line in stdout:
            ended += 1
            yield Record.parsed(json.loads(line))
        if await process.wait() and not ended:
            raise LapFailed(f"Ray Data could not render the rows: {await tail}")
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), STOP_S)
        if process.returncode is None:
            process.kill()
        tail.cancel()


async def _tail(stream: asyncio.StreamReader) -> str:
    """The end of what a process says."""
    said = ""
    while data := await stream.read(4096):
        said = (said + data.decode(errors="replace"))[-TAIL_CHARS:]
    return said.strip()
