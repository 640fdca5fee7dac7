"""PostgreSQL's NOTIFY, shared by all waiters of a process: one LISTEN connection, reopened when it breaks, that wakes those who
wait for a subject.

Notifications only save time: one that is sent while nobody listens is lost, so every waiter also looks again after a while.
The subjects have their texts here. The statements in `sql/` that notify repeat them, and a test compares the two.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

import asyncpg

CHANNEL = "reelray"
WORK = "work"
"""Subject: there is a job to claim, of any endpoint."""
WEBHOOKS = "webhooks"
"""Subject: a webhook is due."""
REOPEN_S = 0.5
PROBE_S = 30.0
"""How often a silent connection is checked: a host that vanishes closes nothing."""

logger = logging.getLogger(__name__)


def job_subject(job_id: UUID) -> str:
    """Subject: the job's state has changed, or its caller wants it cancelled."""
    return str(job_id)


def lines_subject(job_id: UUID) -> str:
    """Subject: the job's log has another line."""
    return f"lines {job_id}"


class Changes:
    """Whether there was a notification about some subjects since the last call."""

    def __init__(self) -> None:
        self._notified = asyncio.Event()

    def tell(self) -> None:
        """There was one."""
        self._notified.set()

    async def changed(self, timeout_s: float) -> bool:
        """Waits for a notification, at most `timeout_s` seconds; returns at once if there was one since the last call."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._notified.wait()
        except TimeoutError:
            return False
        self._notified.clear()
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
            await asyncio.sleep(0)  # a task that is cancelled before it has begun would not close it
            self._task.cancel()
            await asyncio.wait([self._task])

    @contextmanager
    def subscribed(self, *subjects: str) -> Iterator[Changes]:
        """Collects every notification about any of the subjects until the context ends."""
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
            self._tell_everybody()  # notifications of the meantime are lost

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
                except Exception:  # whatever it is, another connection is the remedy
                    return

    async def _reopen(self) -> asyncpg.Connection:
        while True:
            try:
                return await self._open()
            except Exception:  # notifications only save time: nothing ends because there are none
                await asyncio.sleep(REOPEN_S)
