"""The routes of the service itself: its public keys, tokens and health."""

import asyncio

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import ValidationError

from deployments.ingress.access import issued_token, shown_secret
from deployments.ingress.body import read_body
from deployments.ingress.middleware import failure_response
from deployments.ingress.request_context import InvalidBody, TextRoute, outbox_of, settings_of, store_of
from deployments.jobs.database import StoreAway
from deployments.schemas.failures import request_failure
from deployments.schemas.tokens import TokenRequest
from deployments.webhooks.signing import jwks
from engines.errors import ReelrayError

HEALTH_TIMEOUT_S = 2.0
MAX_TOKEN_BODY_BYTES = 10_000
JWKS_MAX_AGE_S = 3600

_TOKEN_BODY = {"requestBody": {"content": {"application/json": {"schema": TokenRequest.model_json_schema(by_alias=False)}}}}

router = APIRouter(route_class=TextRoute)


@router.get("/.well-known/jwks.json")
@router.get("/rest/.well-known/jwks.json", include_in_schema=False)  # its path for callers at rest.fal.ai
async def keys(request: Request) -> Response:
    """The public keys that webhooks are signed with, as a JSON Web Key Set."""
    published = await outbox_of(request).published_keys()
    return JSONResponse(jwks(published), headers={"cache-control": f"public, max-age={JWKS_MAX_AGE_S}"})


@router.post("/rest/tokens/", response_model=str, openapi_extra=_TOKEN_BODY)
@router.post("/rest/tokens", include_in_schema=False)
@router.post("/rest/tokens/realtime", include_in_schema=False)
async def token(request: Request) -> Response:
    """A short-lived token to give to a web page instead of the API key, as a bare JSON string.

    Queue paths accept it as the query parameter `fal_jwt_token`. The token has the key's scopes, minus `admin`, for the apps
    named. It is refused once the key is revoked, or the secret that it was requested with has ended.
    """
    secret = None if settings_of(request).auth == "open" else await shown_secret(request, store_of(request))
    try:
        asked = TokenRequest.model_validate_json(await read_body(request, MAX_TOKEN_BODY_BYTES) or b"{}")
    except ValidationError as exc:
        raise InvalidBody(exc) from None
    return JSONResponse(issued_token(secret, asked), headers={"cache-control": "no-store"})


@router.get("/health")
async def health(request: Request) -> Response:
    """200 while jobs can be submitted, else 503."""
    try:
        async with asyncio.timeout(HEALTH_TIMEOUT_S):
            await store_of(request).check()
            await asyncio.to_thread(request.app.state.check)
    except ReelrayError as exc:
        return failure_response(request_failure(503, "internal_error", exc.message))
    except TimeoutError as exc:
        raise StoreAway("the database does not answer") from exc
    return JSONResponse({"status": "ok"})
