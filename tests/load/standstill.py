"""How long an event loop stood still, because of what it did itself or because the machine was busy with something else."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

NAP_S = 0.002


@asynccontextmanager
async def watched() -> AsyncIterator[list[float]]:
    """How long this process's loop stood still within the block, at most, in seconds; one number."""
    longest = [0.0]

    async def nap_for_ever() -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(NAP_S)
            longest[0] = max(longest[0], time.perf_counter() - began - NAP_S)

    napping = asyncio.create_task(nap_for_ever())
    try:
        await asyncio.sleep(10 * NAP_S)
        longest[0] = 0.0
        yield longest
        await asyncio.sleep(2 * NAP_S)
    finally:
        napping.cancel()
