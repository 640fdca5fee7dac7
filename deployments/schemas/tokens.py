"""Short-lived tokens, which a web page gets instead of an API key: for some apps and some minutes.

JSON Web Tokens (RFC 7519) with HMAC-SHA256; fal-queue-protocol.md, section 3. Each secret of a key has a `token_key` of its own
to sign with, stored beside the secret's hash. So a token needs no row in the database, and it ends with the secret that it was
requested with, when that is revoked or rotated.
"""

import base64
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol
from uuid import UUID

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from deployments.schemas.inputs import Int
from deployments.schemas.responses import app_id

MAX_CHARS = 16_384
MAX_TOKEN_S = 3600
_HEADER = {"alg": "HS256", "typ": "JWT"}


class TokenRequest(BaseModel):
    """What a token is to allow. Unknown fields are refused: one might be meant to restrict the token."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    allowed_apps: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(
        min_length=1, max_length=20, description="Aliases, or ids of endpoints.", examples=[["animatediff-sparsectrl-lcm"]]
    )
    token_expiration: Int = Field(
        120,
        ge=1,
        le=MAX_TOKEN_S,
        description="In seconds; `duration` is another name for it.",
        validation_alias=AliasChoices("token_expiration", "duration"),
    )


class Signer(Protocol):
    """The secret of a key, as far as tokens need it. token_key: signs the tokens that are issued for it, and nothing else."""

    @property
    def id(self) -> UUID: ...  # noqa: D102
    @property
    def key_id(self) -> str: ...  # noqa: D102
    @property
    def token_key(self) -> bytes: ...  # noqa: D102


@dataclass(frozen=True)
class _Anonymous:
    """Signs the tokens of an open service with a key that is forgotten at once."""

    id: UUID
    key_id: str
    token_key: bytes


@dataclass(frozen=True)
class Token:
    """What a token says, not to be trusted before `is_genuine`. expires_at: in seconds since 1970."""

    secret_id: UUID
    key_id: str
    apps: tuple[str, ...]
    expires_at: float
    signed: bytes
    signature: bytes

    def is_genuine(self, secret: Signer) -> bool:
        """Whether it was issued for this secret and has not expired."""
        signature = _signature(secret.token_key, self.signed)
        if not hmac.compare_digest(signature, self.signature):
            return False
        return self.key_id == secret.key_id and time.time() < self.expires_at

    def allows(self, app: str) -> bool:
        """Whether it is for this app. app: an endpoint's id or the start of one. The clients name an app by its alias alone."""
        whole = app_id(app)
        alias = whole.rpartition("/")[2]
        return any(named == alias or app_id(named) == whole for named in self.apps)


def issue(secret: Signer, apps: Sequence[str], lifetime_s: int) -> str:
    """A token for the key that `secret` is of."""
    now = int(time.time())
    claims = {"sub": secret.key_id, "apps": list(apps), "iat": now, "exp": now + lifetime_s}
    signed = f"{_encoded(_HEADER | {'kid': str(secret.id)})}.{_encoded(claims)}"
    return f"{signed}.{_base64(_signature(secret.token_key, signed.encode()))}"


def issue_for_anybody(apps: Sequence[str], lifetime_s: int) -> str:
    """A token from an open service: the clients require one even there. It grants nothing."""
    return issue(_Anonymous(UUID(int=0), "anonymous", secrets.token_bytes(32)), apps, lifetime_s)


def read(text: str) -> Token | None:
    """The token in a query; None if the text is not one."""
    try:
        if len(text) > MAX_CHARS:
            return None
        signed, _, signature = text.rpartition(".")
        header, claims = (json.loads(_decoded(part)) for part in signed.split("."))
        if header["alg"] != _HEADER["alg"]:
            return None
        apps, expires_at = claims["apps"], claims["exp"]
        if not (isinstance(apps, list) and all(isinstance(app, str) for app in apps) and isinstance(expires_at, int)):
            return None
        return Token(UUID(header["kid"]), claims["sub"], tuple(apps), expires_at, signed.encode(), _decoded(signature))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # whatever malformed text can raise
        return None


def _signature(token_key: bytes, signed: bytes) -> bytes:
    return hmac.digest(token_key, signed, hashlib.sha256)


def _encoded(part: dict[str, Any]) -> str:
    return _base64(json.dumps(part, separators=(",", ":")).encode())


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decoded(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
