"""What is deleted and when: files whose time is over, and jobs some time after their end."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from deployments.jobs.database import QUERIES, Database

EXPIRY_BATCH = 100
"""How much is deleted at once: an input may be megabytes, and a file costs a round trip to an object store."""
UNSTORED_S = 3600.0
"""How long the result of a job whose payloads are not to be stored can be fetched; the same as at fal (protocol page 2.4)."""

logger = logging.getLogger(__name__)


class Retention:
    """The expiry of what a database lists. Any number of processes may expire things at once."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add_file(
        self,
        name: str,
        keep_s: float | None,
        owner: str | None = None,
        size: int = 0,
        content_type: str | None = None,
        access: dict[str, Any] | None = None,
    ) -> None:
        """Lists a file before it is written, so that it expires whatever becomes of its job.

        keep_s: None: it does not expire. owner, size: the key whose file it is, and the bytes that count for its quota.
        access: who may read it; None: everybody who knows its URL.
        """
        await self._database.fetch(QUERIES["add_file"], name, keep_s, owner, size, content_type, access)

    async def expire_files(self, delete: Callable[[str], Awaitable[None]]) -> int:
        """Deletes and forgets files whose time is over, `EXPIRY_BATCH` at most. Returns how many it found.

        delete: deletes one file, which may be gone already. If it raises, the file is tried again later.
        """
        rows = await self._database.fetch(QUERIES["take_expired_files"], EXPIRY_BATCH)
        gone = list[str]()
        for name in (row["name"] for row in rows):
            try:
                await delete(name)
                gone.append(name)
            except Exception:
                logger.warning("a file could not be deleted", exc_info=True, extra={"action": "expiry", "file": name})
        await self._database.fetch(QUERIES["forget_files"], gone)
        return len(rows)

    async def expire_jobs(self, jobs_s: float | None) -> int:
        """Deletes jobs that ended `jobs_s` seconds ago (None: no such jobs) and, sooner, those that are not to be stored.

        Their events, logs and webhooks go too; `EXPIRY_BATCH` of each kind at most. A job stays while its webhook is still to be
        delivered. Returns how many it deleted.
        """
        old = await self._database.fetch(QUERIES["expire_jobs"], jobs_s, EXPIRY_BATCH)
        unstored = await self._database.fetch(QUERIES["expire_unstored_jobs"], UNSTORED_S, EXPIRY_BATCH)
        return len(old) + len(unstored)
