"""Who sent a request and what it may do. Callers show an API key or a token issued for one; an open service asks for neither.

The order of the checks gives nothing away to strangers: first the key or token (401), then whether the job is the caller's (404,
whatever the scopes), then whether the key has the scope (403).
"""

from dataclasses import dataclass, replace
from uuid import UUID

from starlette.requests import HTTPConnection, Request

from deployments.ingress.request_context import UnknownRequest, outbox_of, settings_of, store_of
from deployments.jobs.job import Job
from deployments.jobs.keys import DEFAULT_SCOPES, OPEN_SECRET, KeySecret, Scope
from deployments.jobs.store import JobStore
from deployments.schemas import tokens
from deployments.schemas.responses import app_id
from deployments.schemas.tokens import Ticket, Token, TokenRequest
from deployments.webhooks.outbox import Webhook
from engines.errors import Forbidden, Unauthorized


@dataclass(frozen=True)
class Caller:
    """owner: the id of the key; None where the service is open. secret_id: of the secret that was shown, or a token is for."""

    owner: str | None
    scopes: frozenset[Scope]
    secret_id: UUID | None = None

    def require(self, scope: Scope) -> None:
        """Raises `Forbidden` if the caller does not have the scope."""
        if scope not in self.scopes:
            raise Forbidden(f"The API key lacks the scope {scope}.")

    def reaches(self, owner: str | None) -> bool:
        """Whether this caller may know of the jobs of `owner`."""
        return owner == self.owner or Scope.ADMIN in self.scopes


ANYBODY = Caller(None, frozenset(DEFAULT_SCOPES))
STRANGER = Caller("", frozenset())
"""Nobody's key has this id, and no file is his, not even where the service is open."""


async def caller_of(request: HTTPConnection, app: str | None = None) -> Caller:
    """The sender of a request. app: whose path it is for, if it is an app's. Raises `Unauthorized`, `Forbidden`."""
    if settings_of(request).auth == "open":
        return ANYBODY
    return await identify(request, store_of(request), app)


async def is_still_valid(connection: HTTPConnection, caller: Caller) -> bool:
    """Whether the caller's key and its secret have not ended since. A token may have, as at fal."""
    return caller.secret_id is None or await store_of(connection).keys.get_secret(caller.secret_id) is not None


async def job_of(request: Request, app: str, request_id: str, scope: Scope, lines_after: int | None = None) -> Job:
    """The job in a request's path, if its caller has `scope`. lines_after: see `JobStore.get`.

    Raises `UnknownRequest` for another caller's job and for another endpoint's, as if there were none.
    """
    caller = await caller_of(request, app)
    try:
        job_id = UUID(request_id)
    except ValueError:
        raise UnknownRequest from None
    job = await store_of(request).get(job_id, lines_after)
    if job is None or not caller.reaches(job.owner) or app_id(job.endpoint) != app_id(app):
        raise UnknownRequest
    caller.require(scope)
    request.state.request_id = str(job.id)
    return job


async def webhook_of(request: Request, request_id: str, scope: Scope) -> Webhook:
    """The webhook of the job in a request's path, if its caller has `scope`. Raises `UnknownRequest` as `job_of` does."""
    caller = await caller_of(request)
    try:
        job_id = UUID(request_id)
    except ValueError:
        raise UnknownRequest from None
    found = await outbox_of(request).get(job_id)
    if found is None or not caller.reaches(found.owner):
        raise UnknownRequest
    caller.require(scope)
    request.state.request_id = str(job_id)
    return found


async def identify(request: HTTPConnection, store: JobStore, app: str | None = None) -> Caller:
    """The caller of a service with keys: by the key in the header or, without one, by the token in the query.

    A header of another scheme does not count: behind a reverse proxy with a password, browsers always send a `Basic` one.
    app: whose path the request is for; tokens are refused on all other paths. Raises `Unauthorized`, `Forbidden`.
    """
    if _key_of(request) is not None or app is None:
        return _caller(await shown_secret(request, store))
    token = tokens.read(request.query_params.get("fal_jwt_token", ""))
    secret = await _signer(store, token) if token else None
    if token is None or secret is None:
        raise Unauthorized
    if not token.allows(app):
        raise Forbidden("The token is not for this app.")
    caller = _caller(secret)
    return replace(caller, scopes=caller.scopes - {Scope.ADMIN})  # tokens are for web pages


async def reader_of(request: HTTPConnection) -> Caller:
    """Who asks for a file that not everybody may read: the caller whose key is shown, if it may read, or a stranger.

    A stranger is not told what is wrong with his key: it would tell him that there is such a file.
    """
    if settings_of(request).auth == "open":
        return STRANGER
    try:
        caller = await identify(request, store_of(request))
    except Unauthorized:
        return STRANGER
    return caller if Scope.READ in caller.scopes else STRANGER


async def uploader_of(request: Request, *, cdn: bool = False) -> tuple[Caller, KeySecret]:
    """Who uploads, by an API key, and what the upload is signed with. cdn: a token for the CDN will do.

    Raises `Unauthorized`, `Forbidden`.
    """
    store = store_of(request)
    if settings_of(request).auth == "open":
        return ANYBODY, await store.keys.open_secret()
    token = tokens.read(_key_of(request) or "", "cdn") if cdn else None
    secret = await shown_secret(request, store) if token is None else await _signer(store, token)
    if secret is None:
        raise Unauthorized
    caller = _caller(secret)
    caller.require(Scope.SUBMIT)
    return caller, secret


async def ticket_in(request: Request, text: str) -> Ticket:
    """What the upload URL with this signature is good for. Raises `Forbidden`."""
    token = tokens.read(text, "upload")
    is_open = settings_of(request).auth == "open"
    if token is None or await _signer(store_of(request), token, is_open=is_open) is None:
        raise Forbidden("This is no upload URL of this service, or its time is over.")
    return tokens.ticket_of(token)


async def _signer(store: JobStore, token: Token, *, is_open: bool = False) -> KeySecret | None:
    """The secret that a token was issued for; None if it is not genuine."""
    if token.secret_id == OPEN_SECRET:
        secret = await store.keys.open_secret() if is_open else None
    else:
        secret = await store.keys.get_secret(token.secret_id)
    return secret if secret is not None and token.is_genuine(secret) else None


def issued_token(secret: KeySecret | None, asked: TokenRequest) -> str:
    """A token for the key with this secret. secret: None if the service is open."""
    if secret is None:
        return tokens.issue_for_anybody(asked.allowed_apps, asked.token_expiration)
    return tokens.issue(secret, asked.allowed_apps, asked.token_expiration)


async def shown_secret(request: HTTPConnection, store: JobStore) -> KeySecret:
    """The API key in the request's header. Raises `Unauthorized`."""
    secret = _key_of(request)
    found = None if secret is None else await store.keys.find_secret(secret)
    if found is None:
        raise Unauthorized
    return found


def _key_of(request: HTTPConnection) -> str | None:
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    return secret.strip() if scheme.lower() in ("key", "bearer") else None


def _caller(secret: KeySecret) -> Caller:
    scopes = frozenset(map(Scope, secret.scopes))
    return Caller(secret.key_id, scopes | {Scope.READ} if Scope.ADMIN in scopes else scopes, secret.id)
