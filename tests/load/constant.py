"""The ingress with an added route that answers a constant. Its rate is the base of all ratios. Hosted in two ways."""

from typing import Any

from fastapi import FastAPI, Request
from ray import serve

from deployments.hosting.embedded_postgres import database_url
from deployments.ingress.app import create_app
from deployments.settings import Settings, configured_settings

ANSWER = {"status": "IN_QUEUE", "request_id": "00000000-0000-0000-0000-000000000000", "queue_position": 0, "logs": None}


def with_constant(settings: Settings) -> FastAPI:
    """The same app, including its middleware."""
    app = create_app(settings, database_url(settings))

    @app.get("/constant")
    async def constant() -> dict[str, Any]:
        return ANSWER

    @app.post("/constant")
    async def swallow(request: Request) -> dict[str, Any]:
        await request.body()
        return ANSWER

    app.router.routes.insert(0, app.router.routes.pop())  # before the catch-all routes
    app.router.routes.insert(0, app.router.routes.pop())
    return app


def app() -> FastAPI:
    """For uvicorn."""
    return with_constant(configured_settings())


class Replica:
    """For Serve."""


def build(args: Settings) -> serve.Application:
    """The ingress alone, without dispatchers, so no job is claimed."""
    settings = args
    return serve.deployment(serve.ingress(lambda: with_constant(settings))(Replica), name="ingress").bind()
