"""One job in this process: the endpoint's input, its files, the three stages. No Ray, no queue, no database."""

import asyncio
from collections.abc import Callable

from deployments.files.download import download_all, download_folder
from deployments.hosting.demo_weights import write_missing_weights
from deployments.schemas.endpoint import Endpoint
from deployments.settings import Settings
from deployments.stages.protocol import Note
from deployments.stages.throttle import Throttle
from engines.pipeline import Pipeline
from engines.spec import Clip


def render_locally(endpoint: Endpoint, body: bytes, settings: Settings, on_note: Callable[[Note], None]) -> Clip:
    """The clip for an input as JSON. Raises pydantic's `ValidationError`, and `ModelError` for files that cannot be used.

    on_note: is given what would be the lines of a job's log.
    """
    parsed = endpoint.input.parse(body)
    job = parsed.input.resolved()
    with download_folder() as folder:
        media = asyncio.run(download_all(job.media(), settings.fetch, folder))
        write_missing_weights(settings)
        pipeline = Pipeline(endpoint.model, settings.model_configs()[endpoint.model])
        with Throttle("preprocess", on_note) as told:
            conditioning = pipeline.preprocess.encode(job.spec(media), on_progress=told)
    for warning in (*parsed.notes, *conditioning.notes):
        on_note(Note(warning, "WARN"))
    with Throttle("denoise", on_note) as told:
        latents = pipeline.denoise.sample(conditioning, on_progress=told)
    with Throttle("decode", on_note) as told:
        clip: Clip = pipeline.decode.decode(latents, on_progress=told)
    return clip
