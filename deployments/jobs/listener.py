"""What the database says aloud: one LISTEN connection, reopened when it breaks, that wakes whoever waits for a subject.

Waking is a courtesy: what is said while nobody listens is lost, so who waits looks again after a while anyhow.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import asyncpg

CHANNEL = "reelray"
REOPEN_S = 0.5
PROBE_S = 30.0
"""How often a silent connection is asked whether it is still there: a vanished host closes nothing."""

_BROKEN = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)

logger = logging.getLogger(__name__)


class Changes:
    """Whether something was said about a subject since last asked."""

    def __init__(self) -> None:
        self._said = asyncio.Event()

    def tell(self) -> None:
        """Something was said."""
        self._said.set()

    async def changed(self, timeout_s: float) -> bool:
        """Waits until something is said, at most `timeout_s` seconds; at once if it was said since the last call."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._said.wait()
        except TimeoutError:
            return False
        self._said.clear()
        return True


class Listener:
    """Hears `NOTIFY reelray, '<subject>'`. `start` returns once it listens."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._subscribers: defaultdict[str, set[Changes]] = defaultdict(set)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Raises what asyncpg raises if the database cannot be reached."""
        self._task = asyncio.create_task(self._stay_open(await self._open()), name="reelray-listener")

    async def stop(self) -> None:
        """Closes the connection."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    @contextmanager
    def subscribed(self, *subjects: str) -> Iterator[Changes]:
        """Hears everything said about any of the subjects from now on, until left."""
        changes = Changes()
        for subject in subjects:
            self._subscribers[subject].add(changes)
        try:
            yield changes
        finally:
            for subject in subjects:
                self._subscribers[subject].discard(changes)
                if not self._subscribers[subject]:
                    del self._subscribers[subject]

    def _hear(self, connection: asyncpg.Connection, pid: int, channel: str, subject: str) -> None:
        for changes in self._subscribers.get(subject, ()):
            changes.tell()

    def _tell_everybody(self) -> None:
        for subscribers in self._subscribers.values():
            for changes in subscribers:
                changes.tell()

    async def _open(self) -> asyncpg.Connection:
        connection = await asyncpg.connect(self._url, timeout=10)
        try:
            await connection.add_listener(CHANNEL, self._hear)
        except BaseException:
            connection.terminate()
            raise
        return connection

    async def _stay_open(self, connection: asyncpg.Connection) -> None:
        while True:
            try:
                await self._until_closed(connection)
            finally:
                connection.terminate()
            logger.warning("the listening connection broke", extra={"action": "listener_lost"})
            connection = await self._reopen()
            self._tell_everybody()  # something may have been said in the meantime

    async def _until_closed(self, connection: asyncpg.Connection) -> None:
        closed = asyncio.Event()
        connection.add_termination_listener(lambda _: closed.set())
        while not connection.is_closed():
            try:
                async with asyncio.timeout(PROBE_S):
                    await closed.wait()
            except TimeoutError:
                try:
                    await connection.execute("SELECT 1", timeout=10)
                except _BROKEN:
                    return

    async def _reopen(self) -> asyncpg.Connection:
        while True:
            try:
                return await self._open()
            except _BROKEN:
                await asyncio.sleep(REOPEN_S)
