"""One job in this process: the endpoint's input, its files, the three stages. No Ray, no queue, no database."""

import asyncio
from collections.abc import Callable

from deployments.demo import write_missing_weights
from deployments.fetch import fetch_all
from deployments.schemas import Endpoint
from deployments.settings import Settings
from engines.pipeline import Pipeline
from engines.spec import Checkpoint, Clip


def render_locally(endpoint: Endpoint, body: bytes, settings: Settings, on_step: Callable[[Checkpoint], None]) -> Clip:
    """The clip for an input as JSON. Raises pydantic's `ValidationError`, and `ModelError` for files that cannot be used."""
    job = endpoint.input.parse(body).resolved()
    media = asyncio.run(fetch_all(job.media(), settings.fetch))
    write_missing_weights(settings)
    return Pipeline(endpoint.model, settings.model_configs()[endpoint.model]).render(job.spec(media), on_step)
