"""The webhooks to be delivered, beside the jobs they tell of: a row each, written in the transaction that ends its job.

A courier holds a row by a lease and writes with that delivery's token. What it sends is kept before it is sent first, so that
every delivery of a job, by whichever courier, sends the same bytes.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from typing import Any
from uuid import UUID, uuid4

import asyncpg

from deployments.jobs.listener import Changes
from deployments.jobs.store import JobStore, load_queries
from deployments.webhooks.signing import SigningKey

SETTLE_S = 5.0
"""A webhook is listed at this age: longer than its commit takes, so that a reader who goes on from its last place misses none."""

OVERLAP_S = 25 * 3600.0
"""How long a new key is published before it signs, and an old one after it has: fal lets receivers keep the keys for 24 hours,
and we let caches on the way keep them for one more."""

_SQL = load_queries(files("deployments.jobs").joinpath("sql", "webhooks.sql").read_text())


@dataclass(frozen=True)
class Delivery:
    """One attempt at a webhook, in the hand of a courier. Only the holder of `token` may report on it.

    tries: with this one, since it was queued. body: what to send, if that is settled; else `result` or `failure`, as the job
    ended. service_url: where the job's caller reached the service; None of a job older than that is known.
    """

    job_id: UUID
    token: UUID
    url: str
    owner: str | None
    tries: int
    body: bytes | None
    result: dict[str, Any] | None
    failure: dict[str, Any] | None
    service_url: str | None


@dataclass(frozen=True)
class Webhook:
    """How it stands with a job's webhook. next_attempt_at: None once it is over. Times are UTC."""

    job_id: UUID
    owner: str | None
    url: str
    created_at: datetime
    next_attempt_at: datetime | None
    attempts: int
    delivered_at: datetime | None
    last_status: int | None
    last_error: str | None
    body: bytes | None

    @property
    def status(self) -> str:
        """pending, delivered or failed."""
        if self.next_attempt_at is not None:
            return "pending"
        return "failed" if self.delivered_at is None else "delivered"


@dataclass(frozen=True)
class Attempt:
    """A line of a webhook's log. status: what the receiver answered, if it did. error: None if that was an acknowledgement."""

    at: datetime
    attempt: int
    status: int | None
    error: str | None
    duration_s: float


class Outbox:
    """The webhooks in a job store's database; see `JobStore` for what its calls outlast."""

    def __init__(self, store: JobStore) -> None:
        self._store = store

    # For couriers.

    async def claim(self, at_most: int, per_receiver: int, lease_s: float) -> list[Delivery]:
        """Takes webhooks that are due, of all receivers in turn. per_receiver: in hand of one receiver, by all couriers."""
        rows = await self._fetch("claim", uuid4(), at_most, per_receiver, lease_s)
        return [Delivery(**row) for row in rows]

    async def keep_body(self, delivery: Delivery, body: bytes) -> bytes | None:
        """Settles what is sent, unless that is; answers what it is. None: the delivery is no longer this courier's."""
        rows = await self._fetch("keep_body", delivery.job_id, delivery.token, body)
        return bytes(rows[0]["body"]) if rows else None

    async def finish(
        self, delivery: Delivery, status: int | None, error: str | None, duration_s: float, retry_in_s: float | None
    ) -> None:
        """Logs the attempt. error: None if it was acknowledged. retry_in_s: None ends it. No effect if the lease was lost."""
        await self._fetch("finish", delivery.job_id, delivery.token, status, error, duration_s, retry_in_s)

    async def release(self, delivery: Delivery) -> None:
        """Gives back what was not sent to its end, at no cost to its tries."""
        await self._fetch("release", delivery.job_id, delivery.token)

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[Changes]:
        """Hears of every webhook that is queued from now on."""
        async with self._store.watch_subject("webhooks") as changes:
            yield changes

    # For the door and the operator.

    async def get(self, job_id: UUID) -> Webhook | None:
        """The webhook of a job that has ended and asked for one."""
        rows = await self._fetch("get", job_id)
        return Webhook(**rows[0]) if rows else None

    async def attempts(self, job_id: UUID) -> list[Attempt]:
        """What was tried so far."""
        return [Attempt(**row) for row in await self._fetch("attempts", job_id)]

    async def page(self, owner: str | None, after: tuple[datetime, UUID], limit: int) -> list[Webhook]:
        """An owner's webhooks that lie after a place in their order, which is (created_at, job_id)."""
        return [Webhook(**row) for row in await self._fetch("list", owner, *after, limit, SETTLE_S)]

    async def redeliver(self, job_id: UUID) -> bool:
        """Queues a webhook again, delivered or not. False: there is none."""
        return bool(await self._fetch("redeliver", job_id))

    # Signing keys.

    async def signing_key(self) -> SigningKey:
        """What to sign with now."""
        return (await self._keys("signing_key"))[0]

    async def published_keys(self) -> list[SigningKey]:
        """What a signature may be made with, now or soon."""
        return await self._keys("published_keys")

    async def rotate_key(self, overlap_s: float = OVERLAP_S) -> SigningKey:
        """Makes a key, which signs in `overlap_s`; the others are published for that long once more. At 0 they end now."""
        await self.signing_key()  # there is one to go on with
        key = SigningKey.generate()

        async def rotate(connection: asyncpg.Connection) -> list[asyncpg.Record]:
            async with connection.transaction():
                await connection.execute("LOCK TABLE signing_keys IN SHARE ROW EXCLUSIVE MODE")
                await connection.execute(_SQL["retire_keys"], key.id, overlap_s)
                return list(await connection.fetch(_SQL["add_key"], key.id, key.private_key, key.public_key, overlap_s))

        await self._store.outlast(rotate)
        return key

    async def _keys(self, name: str) -> list[SigningKey]:
        """Makes the first key where there is none."""
        while not (rows := await self._fetch(name)):
            key = SigningKey.generate()
            await self._fetch("add_key", key.id, key.private_key, key.public_key, 0.0)
        return [SigningKey(**row) for row in rows]

    async def _fetch(self, name: str, *args: object) -> list[asyncpg.Record]:
        return await self._store.outlast(lambda connection: connection.fetch(_SQL[name], *args))
