"""The input of acme/solid, an endpoint that the tests add. Lies at `deployments/schemas/solid.py` while they do."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from deployments.schemas.description import Endpoint, VideoOutput
from deployments.schemas.inputs import EndpointInput, Int
from engines.solid.config import SolidConfig
from engines.solid.spec import SolidSpec


class SolidInput(EndpointInput):
    """A clip of one grey."""

    grey: Int = Field(128, ge=0, le=255, description="Its level.")

    def spec(self, media: Mapping[str, Path]) -> SolidSpec:
        return SolidSpec(self.seed, 1, 1.0, self.grey)


ENDPOINT = Endpoint("acme/solid", "solid", "solid", "Solid", "text-to-video", SolidInput, VideoOutput, SolidConfig)
