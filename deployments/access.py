"""Who a request is from, and what it may do: an API key, a token that stands for one, or anybody where the service is open.

The order of the refusals tells a stranger nothing: first who asks (401), then whether the job is within reach (404, whatever the
scopes), then whether the key has the scope (403).
"""

from dataclasses import dataclass

from starlette.requests import Request

from deployments.jobs.keys import DEFAULT_SCOPES, KeySecret, Scope
from deployments.jobs.store import JobStore
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


async def identify(request: Request, auth: str, store: JobStore, app: str | None = None) -> Caller:
    """Who asks. auth: as in the settings. Raises `Unauthorized`."""
    if auth == "open":
        return ANYBODY
    secret = await shown_secret(request, store)
    if secret is None:
        raise Unauthorized
    scopes = frozenset(map(Scope, secret.scopes))
    return Caller(secret.key_id, scopes | {Scope.READ} if Scope.ADMIN in scopes else scopes)


async def shown_secret(request: Request, store: JobStore) -> KeySecret | None:
    """The API key in the request's header, if it is a good one."""
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    return await store.find_secret(secret.strip()) if scheme.lower() in ("key", "bearer") else None
