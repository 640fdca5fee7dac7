"""Calls of a replica that may work side by side, and those that must not: a call that may kill the process works alone in it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Isolation:
    """In order of arrival: a call that is to work alone waits for those at work, and those that come after it wait for it."""

    def __init__(self) -> None:
        self._gate = asyncio.Lock()
        self._at_work = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @asynccontextmanager
    async def turn(self, alone: bool) -> AsyncIterator[None]:
        """The call works within the block."""
        async with self._gate:
            if alone:
                await self._idle.wait()
                yield
                return
            self._at_work += 1
            self._idle.clear()
        try:
            yield
        finally:
            self._at_work -= 1
            if not self._at_work:
                self._idle.set()
