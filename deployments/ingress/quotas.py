"""What one API key may have at once: jobs that wait, bytes stored, open streams. An open service has no keys, so no quotas."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from deployments.jobs.keys import KeyUsage
from deployments.jobs.store import JobStore
from deployments.settings import QuotaSettings
from engines.errors import TooManyRequests

REFRESH_S = 1.0
"""How old a count may be. What this process has accepted since is added to it. Several processes together may exceed a quota by
what they accept in this time."""


class Quotas:
    """What each key uses, as far as one process knows."""

    def __init__(self, settings: QuotaSettings):
        self._settings = settings
        self._known: dict[str, tuple[KeyUsage, float]] = {}
        self._streams: Counter[str] = Counter()
        self._uploads: Counter[str | None] = Counter()

    async def refusal(self, store: JobStore, key_id: str | None, size: int) -> TooManyRequests | None:
        """Why a key may not submit another job with files of `size` bytes; None if it may."""
        if key_id is None:
            return None
        limits = self._settings
        usage, until = self._known.get(key_id, (None, 0.0))
        if usage is None or time.monotonic() >= until:
            usage = await store.keys.usage(key_id, at_most=limits.waiting_jobs)
            self._known[key_id] = usage, time.monotonic() + REFRESH_S
        if limits.waiting_jobs is not None and usage.waiting >= limits.waiting_jobs:
            return TooManyRequests(f"This key has {limits.waiting_jobs} jobs waiting, as many as it may have.")
        if limits.stored_bytes is not None and size and usage.stored_bytes + size > limits.stored_bytes:
            return TooManyRequests(f"This key's jobs would have files of more than {limits.stored_bytes} bytes.")
        return None

    def accepted(self, key_id: str | None, size: int) -> None:
        """A job of the key has been stored."""
        if key_id in self._known:
            usage, until = self._known[key_id]
            self._known[key_id] = KeyUsage(usage.waiting + 1, usage.stored_bytes + size), until

    def check_stream(self, key_id: str | None) -> None:
        """Raises `TooManyRequests` if the key may not open another stream."""
        limit = self._settings.open_streams
        if key_id is not None and limit is not None and self._streams[key_id] >= limit:
            raise TooManyRequests(f"This key has {limit} streams and direct calls open, as many as it may have.")

    @contextmanager
    def upload(self, key_id: str | None) -> Iterator[None]:
        """A body of the key that is being received. Raises `TooManyRequests`."""
        limit = self._settings.open_uploads
        if key_id is not None and limit is not None and self._uploads[key_id] >= limit:
            raise TooManyRequests(f"This key has {limit} uploads in hand, as many as it may have.")
        self._uploads[key_id] += 1
        try:
            yield
        finally:
            self._uploads[key_id] -= 1

    @contextmanager
    def stream(self, key_id: str | None) -> Iterator[None]:
        """An open stream, direct call or WebSocket of the key. Raises `TooManyRequests`."""
        self.check_stream(key_id)
        if key_id is None:
            yield
            return
        self._streams[key_id] += 1
        try:
            yield
        finally:
            self._streams[key_id] -= 1
