"""What every route needs: the service's settings, its store, what this process counts, and how it answers.

All our routes are of class `TextRoute`, which skips FastAPI's conversion of parameters.
"""

from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import ValidationError
from pydantic_core import to_json
from starlette.requests import HTTPConnection

from deployments.files.file_store import FileStore
from deployments.ingress.body import Bodies
from deployments.ingress.quotas import Quotas
from deployments.jobs.database import StoreAway
from deployments.jobs.store import JobStore
from deployments.settings import Settings
from deployments.webhooks.outbox import Outbox


class TextRoute(APIRoute):
    """Passes path and query parameters to the endpoint as text.

    FastAPI still documents them from the signature, but does not convert and validate them: that took 60 of the 280 µs of CPU
    time of a status read (FastAPI 0.165, 2 cores). And an id that is not a UUID is to be a 404, not a 422.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What FastAPI calls for each request."""
        endpoint: Callable[..., Coroutine[Any, Any, Response]] = self.endpoint
        names = [parameter.name for parameter in self.dependant.query_params]

        async def handle(request: Request) -> Response:
            query = request.query_params
            return await endpoint(request, **request.path_params, **{name: query[name] for name in names if name in query})

        return handle


class InvalidBody(Exception):
    """The body is no valid JSON, or not what the route takes. findings: pydantic's."""

    def __init__(self, findings: ValidationError):
        super().__init__(findings)
        self.findings = findings


class UnknownRequest(Exception):
    """There is no such job, or no webhook of it, or it is another caller's."""


def settings_of(request: HTTPConnection) -> Settings:
    """The service's settings."""
    settings: Settings = request.app.state.settings
    return settings


def store_of(request: HTTPConnection) -> JobStore:
    """The open job store. Raises `StoreAway` before there is one."""
    store: JobStore | None = request.app.state.store
    if store is None:
        raise StoreAway("the store has not been opened yet")
    return store


def files_of(request: HTTPConnection) -> FileStore:
    """The stored files."""
    files: FileStore = request.app.state.files
    return files


def bodies_of(request: HTTPConnection) -> Bodies:
    """The bodies that this process holds."""
    bodies: Bodies = request.app.state.bodies
    return bodies


def quotas_of(request: HTTPConnection) -> Quotas:
    """What each key uses."""
    quotas: Quotas = request.app.state.quotas
    return quotas


def outbox_of(request: HTTPConnection) -> Outbox:
    """The webhooks in the job store's database. Raises `StoreAway` before it is open."""
    return Outbox(store_of(request).database)


def json_answer(body: dict[str, Any], status: int, headers: Mapping[str, str] | None = None) -> Response:
    """An answer in JSON, serialized three times as fast as by Starlette's `JSONResponse`."""
    return Response(to_json(body), status, headers, "application/json")
