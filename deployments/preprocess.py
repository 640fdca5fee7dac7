"""Serve's wrapper of a model's preprocessing: fetches the input's files, then calls the stage."""

import asyncio
import time
from typing import Any

from deployments.fetch import fetch_all
from deployments.schemas import Endpoint
from deployments.settings import FetchSettings
from deployments.stages import Done, Note, Stream
from engines.registry import build_stage


class Preprocess:
    """One replica. config: of the endpoint's model."""

    def __init__(self, endpoint: Endpoint, config: Any, fetch_settings: FetchSettings):
        self.endpoint = endpoint
        self.fetch_settings = fetch_settings
        self.stage = build_stage(endpoint.model, "preprocess", config)

    async def run(self, job_input: dict[str, Any]) -> Stream:
        """The conditioning for a validated input. Raises `ModelError` for files that cannot be had or used."""
        started = time.monotonic()
        parsed = self.endpoint.input.model_validate(job_input)
        media = await fetch_all(parsed.media(), self.fetch_settings)
        conditioning = await asyncio.to_thread(self.stage.encode, parsed.spec(media))
        for note in conditioning.notes:
            yield Note(note, "WARN")
        yield Done(time.monotonic() - started)
        yield conditioning
