"""What is given out in place of an API key, for a while and for one use: tokens for web pages, tokens for uploads to the CDN, and
the signatures in upload URLs.

JSON Web Tokens (RFC 7519) with HMAC-SHA256; fal-queue-protocol.md, sections 3 and 4. Each secret of a key has its own `token_key`
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
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal, Protocol
from uuid import UUID

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from deployments.schemas.inputs import Int
from deployments.schemas.responses import app_id

MAX_CHARS = 16_384
MAX_TOKEN_S = 3600
CDN_TOKEN_S = 3600
_HEADER = {"alg": "HS256", "typ": "JWT"}

Use = Literal["app", "cdn", "upload"]
"""What a token is for; it is good for nothing else."""


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
    """What a token says, not to be trusted before `is_genuine`. expires_at: in seconds since 1970. claims: what else it says."""

    secret_id: UUID
    key_id: str
    expires_at: float
    claims: dict[str, Any]
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
        return any(named == alias or app_id(named) == whole for named in self.claims["apps"])


@dataclass(frozen=True)
class Ticket:
    """What an upload URL is good for: one file of this name and type, in the file store.

    max_bytes: the most that it may have. exact: it must have so many. owner: the key that it will belong to; None where the
    service is open.
    """

    name: str
    content_type: str
    max_bytes: int
    exact: bool
    owner: str | None


def issue(secret: Signer, apps: Sequence[str], lifetime_s: int) -> str:
    """A token for the key that `secret` is of, for some apps."""
    return _issue(secret, "app", {"apps": list(apps)}, lifetime_s)


def issue_cdn_token(secret: Signer) -> str:
    """A token to upload files with, for `CDN_TOKEN_S` seconds."""
    return _issue(secret, "cdn", {}, CDN_TOKEN_S)


def issue_ticket(secret: Signer, ticket: Ticket, lifetime_s: int) -> str:
    """The signature in an upload URL."""
    return _issue(secret, "upload", asdict(ticket), lifetime_s)


def ticket_of(token: Token) -> Ticket:
    """What a genuine token of use "upload" is good for."""
    return Ticket(**{field.name: token.claims[field.name] for field in fields(Ticket)})


def _issue(secret: Signer, use: Use, claims: dict[str, Any], lifetime_s: int) -> str:
    now = int(time.time())
    said = {"sub": secret.key_id, "use": use, **claims, "iat": now, "exp": now + lifetime_s}
    signed = f"{_encoded(_HEADER | {'kid': str(secret.id)})}.{_encoded(said)}"
    return f"{signed}.{_base64(_signature(secret.token_key, signed.encode()))}"


def issue_for_anybody(apps: Sequence[str], lifetime_s: int) -> str:
    """A token from an open service: the clients require one even there. It grants nothing."""
    return issue(_Anonymous(UUID(int=0), "anonymous", secrets.token_bytes(32)), apps, lifetime_s)


def read(text: str, use: Use = "app") -> Token | None:
    """The token in a text; None if the text is not one, or not for this use."""
    try:
        if len(text) > MAX_CHARS:
            return None
        signed, _, signature = text.rpartition(".")
        header, claims = (json.loads(_decoded(part)) for part in signed.split("."))
        if header["alg"] != _HEADER["alg"]:
            return None
        expires_at = claims["exp"]
        if claims["use"] != use or not isinstance(expires_at, int):
            return None
        return Token(UUID(header["kid"]), claims["sub"], expires_at, claims, signed.encode(), _decoded(signature))
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
