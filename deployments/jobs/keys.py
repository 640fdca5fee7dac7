"""API keys as values. A key owns jobs; its secrets, one or for a while two, are how a caller shows that it is the owner."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from uuid import UUID


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
    """An API key as its operator may see it; the secret is nowhere.

    max_running: of its jobs at once, None without a limit. old_secret_until: when the last secret that was replaced ends, None
    if none is left.
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
    """A secret that is good now, without itself. token_key: what tokens are signed with that it was shown for."""

    id: UUID
    key_id: str
    scopes: Sequence[str]
    token_key: bytes = field(repr=False)
