"""The endpoints that are served: each one's id, model, input and output."""

from dataclasses import dataclass

from pydantic import BaseModel, Field

from deployments.schemas.animatediff import AnimateDiffInput
from deployments.schemas.controlnext import ControlNeXtInput
from deployments.schemas.inputs import EndpointInput


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
    """What is served under an id. model: its name in `engines.registry`. family: prefix of its deployments' names in the YAML.

    realtime: fast enough for callers who send a request a second over a WebSocket.
    """

    id: str
    model: str
    family: str
    input: type[EndpointInput]
    output: type[BaseModel]
    realtime: bool = False


ENDPOINTS: dict[str, Endpoint] = {
    endpoint.id: endpoint
    for endpoint in (
        Endpoint(
            "fal-ai/animatediff-sparsectrl-lcm",
            "animatediff-sparsectrl-lcm",
            "animatediff",
            AnimateDiffInput,
            VideoOutput,
            realtime=True,
        ),
        Endpoint("fal-ai/controlnext", "controlnext", "controlnext", ControlNeXtInput, VideoOutput),
    )
}
