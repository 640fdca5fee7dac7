"""What there is to say about an endpoint, said once: its routes, its OpenAPI document, settings and commands follow from it."""

from dataclasses import dataclass

from pydantic import BaseModel, Field

from deployments.schemas.inputs import EndpointInput
from engines.config import ModelConfig
from engines.demand import UnitTimes


class File(BaseModel):
    """A generated file."""

    url: str = Field(examples=["http://127.0.0.1:8000/files/3f1c/video.mp4"])
    content_type: str = Field(examples=["video/mp4"])
    file_name: str = Field(examples=["video.mp4"])
    file_size: int = Field(description="In bytes.", examples=[182_301])


class VideoOutput(BaseModel):
    """The video, and the seed that reproduces it."""

    video: File
    seed: int


@dataclass(frozen=True)
class Endpoint:
    """What is served under an id.

    model: its name in `engines.registry`. family: name of its config in the settings, and prefix of its deployments' names.
    realtime: fast enough for callers who send a request a second over a WebSocket.
    unit_times: of its stages, until they have been measured.
    title: for people. category: one of fal's, e.g. text-to-video. config: what the family's settings are.
    """

    id: str
    model: str
    family: str
    title: str
    category: str
    input: type[EndpointInput]
    output: type[BaseModel]
    config: type[ModelConfig]
    realtime: bool = False
    unit_times: UnitTimes = (1.0, 1.0, 1.0)

    @property
    def description(self) -> str:
        """One sentence: what the input's class says of itself."""
        return (self.input.__doc__ or "").partition("\n")[0]
