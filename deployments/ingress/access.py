"""Who a request is from, and what it may do: an API key, a token that stands for one, or anybody where the service is open.

The order of the refusals tells a stranger nothing: first who asks (401), then whether the job is within reach (404, whatever the
scopes), then whether the key has the scope (403).
"""

from dataclasses import dataclass, replace

from starlette.requests import Request

from deployments import tokens
from deployments.jobs.keys import DEFAULT_SCOPES, KeySecret, Scope
from deployments.jobs.store import JobStore
from deployments.schemas import TokenRequest
from engines.errors import Forbidden, Unauthorized


@dataclass(frozen=True)
class Caller:
    """owner: the id of the key; None where the service is open."""

    owner: str | None
    scopes: frozenset[Scope]

    def require(self, scope: Scope) -> None:
        """Raises `Forbidden` without it."""
        if scope not in self.scopes:
            raise Forbidden(f"The API key lacks the scope {scope}.")

    def reaches(self, owner: str | None) -> bool:
        """Whether this caller may know of the jobs of `owner`."""
        return owner == self.owner or Scope.ADMIN in self.scopes


ANYBODY = Caller(None, frozenset(DEFAULT_SCOPES))


async def identify(request: Request, store: JobStore, app: str | None = None) -> Caller:
    """Who asks of a service with keys, by the key in the header, or where there is none by the token in the query.

    app: whose path this is; without one tokens are not taken. Raises `Unauthorized`, `Forbidden`.
    """
    if "authorization" in request.headers or app is None:
        return _caller(await shown_secret(request, store))
    token = tokens.read(request.query_params.get("fal_jwt_token", ""))
    secret = await store.get_secret(token.secret_id) if token else None
    if token is None or secret is None or not token.is_genuine(secret):
        raise Unauthorized
    if not token.allows(app):
        raise Forbidden("The token is not for this app.")
    caller = _caller(secret)
    return replace(caller, scopes=caller.scopes - {Scope.ADMIN})  # a page is nobody's operator


def issued_token(secret: KeySecret | None, asked: TokenRequest) -> str:
    """A token for the key whose secret was shown; for anybody, None, where the service is open."""
    if secret is None:
        return tokens.issue_for_anybody(asked.allowed_apps, asked.token_expiration)
    return tokens.issue(secret, asked.allowed_apps, asked.token_expiration)


async def shown_secret(request: Request, store: JobStore) -> KeySecret:
    """The API key in the request's header. Raises `Unauthorized`."""
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    found = await store.find_secret(secret.strip()) if scheme.lower() in ("key", "bearer") else None
    if found is None:
        raise Unauthorized
    return found


def _caller(secret: KeySecret) -> Caller:
    scopes = frozenset(map(Scope, secret.scopes))
    return Caller(secret.key_id, scopes | {Scope.READ} if Scope.ADMIN in scopes else scopes)
