"""The webhooks to be delivered, in the jobs' database: a row each, written in the transaction that ends its job.

A courier holds a row by a lease and writes with that delivery's token. The body is stored before it is first sent, so that
every delivery of a job, by whichever courier, sends the same bytes.
"""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

import asyncpg

from deployments.jobs.database import Database, load_statements
from deployments.jobs.listener import WEBHOOKS, Changes
from deployments.webhooks.signing import SigningKey

SETTLE_S = 5.0
"""A webhook is listed at this age, which is longer than its commit takes: readers who continue from the last one miss none."""

OVERLAP_S = 25 * 3600.0
"""How long a new key is published before it signs, and an old one after it has: fal lets receivers keep the keys for 24 hours,
and we let caches on the way keep them for one more."""

_SQL = load_statements("webhooks.sql")


@dataclass(frozen=True)
class Delivery:
    """One attempt at a webhook, held by a courier. Only the holder of `token` may report on it.

    tries: with this one, since it was queued. body: what to send, if it is stored already; otherwise there is `result` or
    `failure`. service_url: where the job's caller reached the service; None if the job was submitted without it.
    traceparent: the job's trace.
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
    traceparent: str | None


@dataclass(frozen=True)
class Webhook:
    """The state of a job's webhook. next_attempt_at: None once it is over. Times are UTC."""

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
    """The webhooks in a database. Every call may raise `StoreAway`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # For couriers.

    async def claim(self, at_most: int, per_receiver: int, per_owner: int, lease_s: float) -> list[Delivery]:
        """Takes webhooks that are due, of all owners in turn, and of an owner's receivers in turn.

        per_receiver, per_owner: how many of one receiver of an owner, and of one owner, all couriers may hold.
        """
        await self._fetch("wake")
        begin_with = random.randrange(-(2**62), 2**62)
        rows = await self._fetch("claim", uuid4(), at_most, per_receiver, per_owner, lease_s, begin_with)
        return [Delivery(**row) for row in rows]

    async def keep_body(self, delivery: Delivery, body: bytes) -> bytes | None:
        """Stores the body if none is stored yet; returns the stored body. None: the delivery is no longer this courier's."""
        rows = await self._fetch("keep_body", delivery.job_id, delivery.token, body)
        return bytes(rows[0]["body"]) if rows else None

    async def finish(
        self, delivery: Delivery, status: int | None, error: str | None, duration_s: float, retry_in_s: float | None
    ) -> None:
        """Logs the attempt. error: None if it was acknowledged. retry_in_s: None ends it. No effect if the lease was lost."""
        await self._fetch("finish", delivery.job_id, delivery.token, status, error, duration_s, retry_in_s, delivery.tries)

    async def release(self, delivery: Delivery) -> None:
        """Gives back a delivery that was interrupted; it does not count as a try."""
        await self._fetch("release", delivery.job_id, delivery.token)

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[Changes]:
        """Hears of every webhook that is queued from now on."""
        with self._database.watch(WEBHOOKS) as changes:
            yield changes

    # For the door and the operator.

    async def get(self, job_id: UUID) -> Webhook | None:
        """The webhook of a job that has ended and asked for one."""
        rows = await self._fetch("get", job_id)
        return Webhook(**rows[0]) if rows else None

    async def backlog(self) -> tuple[int, float]:
        """How many webhooks will still be tried, and for how many seconds the first of them has waited."""
        row = (await self._fetch("backlog"))[0]
        return row["waiting"], row["oldest_s"]

    async def attempts(self, job_id: UUID) -> list[Attempt]:
        """What was tried so far."""
        return [Attempt(**row) for row in await self._fetch("attempts", job_id)]

    async def page(self, owner: str | None, after: tuple[datetime, UUID], limit: int) -> list[Webhook]:
        """An owner's webhooks after a place in their order, which is (created_at, job_id)."""
        return [Webhook(**row) for row in await self._fetch("list", owner, *after, limit, SETTLE_S)]

    async def redeliver(self, job_id: UUID) -> bool:
        """Queues a webhook again, delivered or not. False: there is none."""
        return bool(await self._fetch("redeliver", job_id))

    # Signing keys.

    async def signing_key(self) -> SigningKey:
        """What to sign with now."""
        return (await self._keys("signing_key"))[0]

    async def published_keys(self) -> list[SigningKey]:
        """The keys with which signatures are made, now or soon."""
        return await self._keys("published_keys")

    async def rotate_key(self, overlap_s: float = OVERLAP_S) -> SigningKey:
        """Makes a key, which signs in `overlap_s`; the others are published for as long again after that. At 0 they end now."""
        await self.signing_key()  # makes the first key where there is none, which signs until then
        key = SigningKey.generate()

        async def rotate(connection: asyncpg.Connection) -> list[asyncpg.Record]:
            async with connection.transaction():
                await connection.execute("LOCK TABLE signing_keys IN SHARE ROW EXCLUSIVE MODE")
                await connection.execute(_SQL["retire_keys"], key.id, overlap_s)
                return list(await connection.fetch(_SQL["add_key"], key.id, key.private_key, key.public_key, overlap_s))

        await self._database.run(rotate)
        return key

    async def _keys(self, name: str) -> list[SigningKey]:
        """Makes the first key where there is none."""
        while not (rows := await self._fetch(name)):
            key = SigningKey.generate()
            await self._fetch("add_key", key.id, key.private_key, key.public_key, 0.0)
        return [SigningKey(**row) for row in rows]

    async def _fetch(self, name: str, *args: object) -> list[asyncpg.Record]:
        return await self._database.fetch(_SQL[name], *args)
