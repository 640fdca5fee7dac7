"""One job in this process: the endpoint's input, its files, the three stages. No Ray, no queue, no database."""

import asyncio

from deployments.demo import write_missing_weights
from deployments.fetch import download_folder, fetch_all
from deployments.schemas import Endpoint
from deployments.settings import Settings
from engines.pipeline import OnStep, Pipeline
from engines.spec import Clip, OnProgress


def render_locally(endpoint: Endpoint, body: bytes, settings: Settings, on_step: OnStep, on_progress: OnProgress) -> Clip:
    """The clip for an input as JSON. Raises pydantic's `ValidationError`, and `ModelError` for files that cannot be used."""
    job = endpoint.input.parse(body).resolved()
    with download_folder() as folder:
        media = asyncio.run(fetch_all(job.media(), settings.fetch, folder))
        write_missing_weights(settings)
        pipeline = Pipeline(endpoint.model, settings.model_configs()[endpoint.model])
        return pipeline.render(job.spec(media), on_step, on_progress)
