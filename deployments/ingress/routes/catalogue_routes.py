"""What is served and what was: the endpoints' OpenAPI documents, the catalogue, and a key's history of requests."""

import uuid
from collections.abc import Callable, Coroutine, Iterable
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from deployments.ingress.access import caller_of
from deployments.ingress.request_context import TextRoute, settings_of, store_of
from deployments.ingress.target_routing import queue_base, service_base
from deployments.jobs.history import history
from deployments.jobs.keys import Scope
from deployments.schemas import catalogue
from deployments.schemas.endpoint import ENDPOINTS, Endpoint
from deployments.schemas.openapi import queue_document, service_document
from deployments.settings import Settings
from engines.errors import NotFound, ReelrayError


class PlatformRoute(TextRoute):
    """Answers our errors in the shape of fal's platform API."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What FastAPI calls for each request."""
        handle = super().get_route_handler()

        async def handle_or_tell(request: Request) -> Response:
            try:
                return await handle(request)
            except ReelrayError as exc:
                request.state.request_id = str(uuid.uuid4())
                error = {"type": exc.type, "message": exc.message, "docs_url": None, "request_id": request.state.request_id}
                return JSONResponse({"error": error}, exc.status)

        return handle_or_tell


router = APIRouter(prefix="/v1/models", tags=["catalogue"], route_class=PlatformRoute)
documents = APIRouter(tags=["catalogue"], route_class=TextRoute)


def describe(app: FastAPI) -> None:
    """Has GET /openapi.json and /docs describe the endpoints that are served, beside the other routes of `app`."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            about = "Video generation behind fal's queue API."
            routes = get_openapi(title=app.title, version="1.0.0", description=about, routes=app.routes)
            app.openapi_schema = service_document(routes, served(app.state.settings))
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's own way to change it


def served(settings: Settings) -> Iterable[Endpoint]:
    """The endpoints that the settings do not leave out."""
    configs = settings.model_configs()
    return [endpoint for endpoint in ENDPOINTS.values() if endpoint.model in configs]


@documents.get("/api/openapi/queue/openapi.json", response_model=dict[str, Any])
async def endpoint_document(request: Request, endpoint_id: str = "") -> Response:
    """The OpenAPI document of one endpoint's queue, as at fal."""
    endpoint = next((each for each in served(settings_of(request)) if each.id == endpoint_id), None)
    if endpoint is None:
        raise NotFound("There is no endpoint with that endpoint_id.")
    return JSONResponse(queue_document(endpoint, *_urls(request)))


@router.get("", response_model=catalogue.ModelPage)
async def models(
    request: Request,
    limit: str = "50",
    cursor: str = "",
    endpoint_id: str = "",
    q: str = "",
    category: str = "",
    status: str = "",
    expand: str = "",
) -> Response:
    """The endpoints that are served. endpoint_id may be given several times; q: words in an id, a name or a description."""
    given = {name: value for name, value in request.query_params.items() if value}
    ids = request.query_params.getlist("endpoint_id")
    return _json(catalogue.model_page(served(settings_of(request)), given, [each for each in ids if each], _urls(request)))


@router.get("/requests/by-endpoint", response_model=catalogue.HistoryPage)
async def requests_by_endpoint(
    request: Request,
    endpoint_id: str = "",
    limit: str = "50",
    cursor: str = "",
    start: str = "",
    end: str = "",
    status: str = "",
    request_id: str = "",
    expand: str = "",
) -> Response:
    """The caller's requests to an endpoint that have ended, newest end first; without `start` and `end`, of the last day.

    status: success, error (5xx) or user_error (4xx, cancelled), or several with commas. cursor: the previous page's
    `next_cursor`. expand: `payloads` for inputs and outputs.
    """
    caller = await caller_of(request)
    caller.require(Scope.READ)
    given = {name: value for name, value in request.query_params.items() if value}
    asked = catalogue.read_history_query(given, ENDPOINTS, datetime.now(UTC))
    found = await history(store_of(request).database, caller.owner, asked)
    return _json(catalogue.history_page(found, asked, _urls(request)[1]))


def _json(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(exclude_none=False), media_type="application/json")


def _urls(request: Request) -> tuple[str, str]:
    """Of the queue and of the service, as this caller knows them."""
    public_url = settings_of(request).public_url
    return queue_base(request.scope, public_url), service_base(request.scope, public_url)
