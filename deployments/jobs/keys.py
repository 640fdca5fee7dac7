"""API keys. A key owns jobs; its secrets, one or for a while two, are how a caller proves to be the owner."""

import hashlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from uuid import UUID

import asyncpg

from deployments.jobs.database import QUERIES, Database, storable
from deployments.schemas.endpoint import ENDPOINTS

CACHE_S = 2.0
"""How long a process may still accept a key or secret that has ended, if it has just looked it up."""
OPEN_SECRET = UUID(int=0)
ANONYMOUS = "anonymous"
"""In place of a key's id, where the service is open."""


class Scope(StrEnum):
    """What a key may do.

    submit: queue, cancel, and have webhooks sent again. read: status, result and webhooks. admin: read, and what else the key may
    do to a job that exists, for the jobs of every key.
    """

    SUBMIT = "submit"
    READ = "read"
    ADMIN = "admin"


DEFAULT_SCOPES = (Scope.SUBMIT, Scope.READ)


@dataclass(frozen=True)
class ApiKey:
    """An API key as its operator may see it, without its secret.

    max_running: how many of its jobs may run at once, None without a limit. old_secret_until: when the last secret that was
    replaced ends, None if none is left.
    """

    id: str
    name: str
    created_at: datetime
    revoked_at: datetime | None
    max_running: int | None
    scopes: Sequence[str]
    old_secret_until: datetime | None


@dataclass(frozen=True)
class KeySecret:
    """What is known of a valid secret, without the secret itself. token_key: signs the tokens that were issued for it."""

    id: UUID
    key_id: str
    scopes: Sequence[str]
    token_key: bytes = field(repr=False)


@dataclass(frozen=True)
class KeyUsage:
    """waiting: queued jobs. stored_bytes: of uploads, and of files that came with jobs, until minutes after those have ended."""

    waiting: int
    stored_bytes: int


class Keys:
    """The API keys in a database. Secrets that were looked up are remembered for `CACHE_S`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: dict[bytes | UUID, tuple[KeySecret, float]] = {}
        self._open: KeySecret | None = None

    async def create(self, name: str, max_running: int | None = None, scopes: Sequence[Scope] = DEFAULT_SCOPES) -> str:
        """Makes a key and returns its secret, `<id>:<256 random bits>`. Only a hash is kept, so it cannot be shown again.

        max_running: how many of its jobs may run at once, at all endpoints together; the others wait and block nobody.
        """
        key_id = secrets.token_hex(8)
        secret = _new_secret(key_id)
        args = (key_id, storable(name), _hash(secret), max_running, list(scopes))
        await self._database.fetch(QUERIES["create_key"], *args)
        return secret

    async def rotate(self, key_id: str, overlap_s: float) -> str | None:
        """Gives a key another secret and returns it; its earlier ones end in `overlap_s` seconds.

        None: there is no such key, or it has ended. The key keeps its jobs. Tokens end with the secret that they were issued for.
        """
        key_id = storable(key_id)
        secret = _new_secret(key_id)

        async def replace(connection: asyncpg.Connection) -> list[asyncpg.Record]:
            async with connection.transaction():
                rows = list(await connection.fetch(QUERIES["lock_key"], key_id))
                if rows:
                    await connection.fetch(QUERIES["retire_secrets"], key_id, _hash(secret), overlap_s)
                    await connection.fetch(QUERIES["add_secret"], key_id, _hash(secret))
                return rows

        rotated = await self._database.run(replace)
        self._known.clear()
        return secret if rotated else None

    async def list_all(self) -> list[ApiKey]:
        """Every key, the revoked ones included."""
        return [ApiKey(**row) for row in await self._database.fetch(QUERIES["list_keys"])]

    async def revoke(self, key_id: str) -> bool:
        """Ends a key, within `CACHE_S` everywhere, if it has not ended before. False: there is no such key."""
        revoked = await self._database.fetch(QUERIES["revoke_key"], storable(key_id))
        self._known.clear()
        return bool(revoked)

    async def find_secret(self, secret: str) -> KeySecret | None:
        """What is known of a secret. None: it is not valid, or no longer."""
        return await self._look_up("find_secret", _hash(secret))

    async def get_secret(self, secret_id: UUID) -> KeySecret | None:
        """The same by the secret's id, for callers with a token."""
        return await self._look_up("get_secret", secret_id)

    async def open_secret(self) -> KeySecret:
        """What an open service signs with. It belongs to no key."""
        while self._open is None:  # another process has just made it, if there is no row
            for row in await self._database.fetch(QUERIES["open_secret"]):
                self._open = KeySecret(OPEN_SECRET, ANONYMOUS, (), row["token_key"])
        return self._open

    async def usage(self, key_id: str, *, at_most: int | None) -> KeyUsage:
        """What a key has here now. at_most: counts no further than this many jobs."""
        return KeyUsage(**(await self._database.fetch(QUERIES["key_usage"], key_id, at_most, list(ENDPOINTS)))[0])

    async def expire_secrets(self) -> int:
        """Deletes the secrets that were replaced and have ended. Returns how many."""
        return len(await self._database.fetch(QUERIES["expire_secrets"]))

    async def _look_up(self, query: str, name: bytes | UUID) -> KeySecret | None:
        if known := self._known.get(name):
            secret, until = known
            if time.monotonic() < until:
                return secret
            self._known.pop(name, None)
        asked_at = time.monotonic()
        rows = await self._database.fetch(QUERIES[query], name)
        if not rows:
            return None
        secret = KeySecret(**rows[0])
        self._known[name] = (secret, asked_at + CACHE_S)
        return secret


def _new_secret(key_id: str) -> str:
    return f"{key_id}:{secrets.token_urlsafe(32)}"


def _hash(secret: str) -> bytes:
    """SHA-256 is enough: 256 random bits cannot be guessed, so a slow hash would protect nothing."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()
