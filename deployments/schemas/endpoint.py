"""The wire contract: the endpoints with their inputs and outputs, and fal's two error shapes.

Facts: `fal-queue-protocol.md` sections 0 and 6, `video-models.md` section 3. Field errors carry pydantic's own types
where pydantic has one, fal's otherwise; both clients pass them through.
"""

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError, PydanticKnownError

from deployments.jobs.job import Failure
from engines.animatediff.config import API_FRAMES
from engines.animatediff.spec import AnimateDiffSpec, Keyframe
from engines.controlnext.spec import IMAGE_FIELD, VIDEO_FIELD, ControlNeXtSpec
from engines.errors import ModelError, ReelrayError, StartTimeout
from engines.spec import RenderSpec

MAX_PROMPT_CHARS = 2000
MAX_ECHO_CHARS = 200
"""A wrong value is shown in its error up to this length: a data URI of megabytes is nobody's hint."""


def _no_bool(value: object) -> object:
    if isinstance(value, bool):  # pydantic would read true as 1
        raise PydanticKnownError("int_type")
    return value


def _not_blank(value: str) -> str:
    if not value.strip():
        raise PydanticKnownError("string_too_short", {"min_length": 1})
    return value


def _fetchable(value: str) -> str:
    if not value.lower().startswith(("http://", "https://", "data:")):
        raise PydanticKnownError("url_scheme", {"expected_schemes": "'http', 'https' or 'data'"})
    return value


MAX_TOKEN_S = 3600

MAX_AREA = 1024 * 576
"""Pixels of a ControlNeXt frame: what the model was trained on. Larger ones cost memory and look worse."""

Seed = Annotated[int | None, BeforeValidator(_no_bool), Field(ge=0, le=2**63 - 1)]
Int = Annotated[int, BeforeValidator(_no_bool)]
Bool = Annotated[bool, Field(strict=True)]
Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
MediaUrl = Annotated[str, AfterValidator(_fetchable)]


class EndpointInput(BaseModel):
    """What every endpoint's input can do. Unknown fields are refused: a misspelt one must not pass for its default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: Seed = Field(None, description="Same seed and input, same video.", examples=[42])

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """The input in a request body; an empty body is {}. Raises pydantic's `ValidationError`, with a loc for each fault."""
        parsed = cls.model_validate_json(body or b"{}")
        if faults := parsed.faults():
            raise ValidationError.from_exception_data(cls.__name__, faults)
        return parsed

    def faults(self) -> list[InitErrorDetails]:
        """What is wrong between fields that are right each by itself."""
        return []

    def resolved(self) -> Self:
        """The input with its seed drawn if the caller left it open, so that a retry renders the same video.

        32 bits, because a JavaScript caller gets it back as a double.
        """
        return self if self.seed is not None else self.model_copy(update={"seed": secrets.randbits(32)})

    def media(self) -> dict[str, str]:
        """Field name -> URL or data URI of every file to fetch."""
        raise NotImplementedError

    def spec(self, media: Mapping[str, Path]) -> RenderSpec:
        """What the model is asked for, given every file that `media()` names. Reads them, or names them to the model."""
        raise NotImplementedError


class File(BaseModel):
    """A generated file."""

    url: str = Field(examples=["http://127.0.0.1:8000/files/3f1c/video.mp4"])
    content_type: str = Field(examples=["video/mp4"])
    file_name: str = Field(examples=["video.mp4"])
    file_size: int = Field(description="In bytes.", examples=[182_301])


class AnimateDiffInput(EndpointInput):
    """Text and up to three keyframes to a clip of 16 frames."""

    prompt: Annotated[str, AfterValidator(_not_blank)] = Field(
        max_length=MAX_PROMPT_CHARS, description="What to show.", examples=["Drone footage, futuristic city at night"]
    )
    negative_prompt: str = Field(
        "", max_length=MAX_PROMPT_CHARS, description="What to avoid; only used with a guidance scale above 1."
    )
    controlnet_type: Literal["scribble", "rgb"] = Field(
        "scribble", description="How to read the keyframes: white lines on black, or full pictures."
    )
    num_inference_steps: Int = Field(4, ge=1, le=50, description="LCM steps; 2 to 12 are useful.")
    guidance_scale: Number = Field(1, ge=1, le=10, description="Above 1 each step costs twice as much.")
    keyframe_0_image_url: MediaUrl | None = Field(None, description="Image URL or data URI.")
    keyframe_0_index: Int | None = Field(None, ge=0, lt=API_FRAMES, description="The frame that follows it.", examples=[0])
    keyframe_1_image_url: MediaUrl | None = Field(None, description="Image URL or data URI.")
    keyframe_1_index: Int | None = Field(None, ge=0, lt=API_FRAMES, description="The frame that follows it.", examples=[8])
    keyframe_2_image_url: MediaUrl | None = Field(None, description="Image URL or data URI.")
    keyframe_2_index: Int | None = Field(None, ge=0, lt=API_FRAMES, description="The frame that follows it.", examples=[15])

    def _keyframes(self) -> list[tuple[int, str | None, int | None]]:
        return [(k, getattr(self, f"keyframe_{k}_image_url"), getattr(self, f"keyframe_{k}_index")) for k in range(3)]

    def faults(self) -> list[InitErrorDetails]:
        """A keyframe is an image and an index; no two keyframes share a frame."""
        found: list[InitErrorDetails] = []
        taken: dict[int, int] = {}
        for k, url, index in self._keyframes():
            image_field, index_field = f"keyframe_{k}_image_url", f"keyframe_{k}_index"
            if url is not None and index is None:
                message = PydanticCustomError("missing", "{given} needs {absent}", {"given": image_field, "absent": index_field})
                found.append(InitErrorDetails(type=message, loc=(index_field,), input=None))
            if index is not None and url is None:
                message = PydanticCustomError("missing", "{given} needs {absent}", {"given": index_field, "absent": image_field})
                found.append(InitErrorDetails(type=message, loc=(image_field,), input=None))
            if index is not None and (first := taken.setdefault(index, k)) != k:
                message = PydanticCustomError(
                    "value_error", "frame {index} is already taken by keyframe_{first}_index", {"index": index, "first": first}
                )
                found.append(InitErrorDetails(type=message, loc=(index_field,), input=index))
        return found

    def media(self) -> dict[str, str]:
        """The keyframes' images."""
        return {f"keyframe_{k}_image_url": url for k, url, _ in self._keyframes() if url is not None}

    def spec(self, media: Mapping[str, Path]) -> AnimateDiffSpec:
        """The clip to render. Call it on a resolved input."""
        assert self.seed is not None
        fields = (
            (index, f"keyframe_{k}_image_url") for k, url, index in self._keyframes() if url is not None and index is not None
        )
        return AnimateDiffSpec(
            seed=self.seed,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            controlnet_type=self.controlnet_type,
            keyframes=tuple(Keyframe(index=index, image=media[field].read_bytes(), field=field) for index, field in fields),
        )


class ControlNeXtInput(EndpointInput):
    """A reference image and a driving video to that person moving so."""

    image_url: MediaUrl = Field(description="The reference image: URL or data URI. Parts beyond the output's aspect are cut off.")
    video_url: MediaUrl = Field(description="The driving video: URL or data URI. Its poses are fitted to the reference's body.")
    height: Int = Field(1024, ge=256, le=1024, multiple_of=64, description="Of the output, in pixels.")
    width: Int = Field(576, ge=256, le=1024, multiple_of=64, description="Of the output, in pixels.")
    guidance_scale: Number = Field(3, ge=1, le=10, description="At 1 each step costs half as much.")
    num_inference_steps: Int = Field(25, ge=1, le=50, description="Denoising steps.")
    max_frame_num: Int = Field(
        240,
        ge=2,
        le=240,
        description="Most frames of the output: the reference's own, which is frame 0, and up to 239 driven ones.",
    )
    batch_frames: Int = Field(24, ge=2, le=32, description="Frames that are denoised together.")
    overlap: Int = Field(6, ge=1, description="Frames that neighbouring batches share; less than batch_frames.")
    sample_stride: Int = Field(2, ge=1, le=8, description="Every so manieth frame of the driving video is used.")
    decode_chunk_size: Int = Field(2, ge=1, le=32, description="Frames that the VAE decodes together; larger flickers less.")
    motion_bucket_id: Number = Field(127, ge=0, le=255, description="How much motion the model is told to expect.")
    fps: Int = Field(7, ge=1, le=60, description="Frame rate of the output, which the model is told as well.")
    controlnext_cond_scale: Number = Field(1, ge=0, le=2, description="Strength of the poses; 0 leaves them out.")
    video_is_pose: Bool = Field(False, description="The driving video shows drawn poses already; they are used as they are.")
    strict_reference: Bool = Field(
        False, description="The conditions of the published code (6, 128, 0.02) whatever fps and motion_bucket_id are."
    )

    def faults(self) -> list[InitErrorDetails]:
        """Windows must overlap and move on; a frame must not be larger than the model's."""
        found: list[InitErrorDetails] = []
        if self.overlap >= self.batch_frames:
            found.append(
                InitErrorDetails(
                    type=PydanticCustomError(
                        "less_than", "Input should be less than batch_frames, {lt}", {"lt": self.batch_frames}
                    ),
                    loc=("overlap",),
                    input=self.overlap,
                )
            )
        if self.height * self.width > MAX_AREA:
            message = PydanticCustomError(
                "value_error",
                "{width}x{height} are more pixels than the {area} of 1024x576",
                {"width": self.width, "height": self.height, "area": MAX_AREA},
            )
            found.append(InitErrorDetails(type=message, loc=("height",), input=self.height))
        return found

    def media(self) -> dict[str, str]:
        """The image and the video."""
        return {IMAGE_FIELD: self.image_url, VIDEO_FIELD: self.video_url}

    def spec(self, media: Mapping[str, Path]) -> ControlNeXtSpec:
        """The video to render. Call it on a resolved input."""
        assert self.seed is not None
        return ControlNeXtSpec(
            image=media[IMAGE_FIELD], video=media[VIDEO_FIELD], **self.model_dump(exclude={"image_url", "video_url"})
        )


class VideoOutput(BaseModel):
    """The video, and the seed that makes it again."""

    video: File
    seed: int


@dataclass(frozen=True)
class Endpoint:
    """What is served under an id. model: its name in `engines.registry`. family: begins its deployments' names in the YAML."""

    id: str
    model: str
    family: str
    input: type[EndpointInput]
    output: type[BaseModel]


ENDPOINTS: dict[str, Endpoint] = {
    endpoint.id: endpoint
    for endpoint in (
        Endpoint("fal-ai/animatediff-sparsectrl-lcm", "animatediff-sparsectrl-lcm", "animatediff", AnimateDiffInput, VideoOutput),
        Endpoint("fal-ai/controlnext", "controlnext", "controlnext", ControlNeXtInput, VideoOutput),
    )
}


class TokenRequest(BaseModel):
    """What a token is asked to be good for. Unknown fields are refused: one might ask for less than we would give."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    allowed_apps: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(
        min_length=1, max_length=20, description="Aliases, or ids of endpoints.", examples=[["animatediff-sparsectrl-lcm"]]
    )
    token_expiration: Int = Field(
        120,
        ge=1,
        le=MAX_TOKEN_S,
        description="In seconds; `duration` is another name for it.",
        validation_alias=AliasChoices("token_expiration", "duration"),
    )


def validation_failure(exc: ValidationError) -> Failure:
    """Pydantic's findings in fal's shape: 422, one entry a fault, loc beginning with "body"."""
    details = []
    for fault in exc.errors(include_url=False, include_context=True):
        detail: dict[str, Any] = {
            "loc": ["body", *fault["loc"]],
            "msg": fault["msg"],
            "type": fault["type"],
            "url": f"https://docs.fal.ai/errors#{fault['type']}",
        }
        if ctx := fault.get("ctx"):
            detail["ctx"] = {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in ctx.items()}
        if isinstance(fault["input"], (int, float, str)) and len(str(fault["input"])) <= MAX_ECHO_CHARS:
            is_json = not isinstance(fault["input"], float) or math.isfinite(fault["input"])  # NaN and Infinity are not
            detail["input"] = fault["input"] if is_json else str(fault["input"])
        details.append(detail)
    text = "; ".join(f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in details)
    return Failure(422, {"detail": details}, text, details[0]["type"], {"X-Fal-Needs-Retry": "0"})


def error_failure(exc: ReelrayError) -> Failure:
    """One of our errors in fal's shape: a list with a loc for the model's, a string with an error_type for the queue's."""
    if isinstance(exc, ModelError):
        detail: dict[str, Any] = {
            "loc": list(exc.loc or ("body",)),
            "msg": exc.message,
            "type": exc.type,
            "url": f"https://docs.fal.ai/errors#{exc.type}",
        }
        if exc.ctx:
            detail["ctx"] = exc.ctx
        headers = {"X-Fal-Needs-Retry": str(int(exc.retryable))}
        return Failure(exc.status, {"detail": [detail]}, exc.message, exc.type, headers)
    headers = {"X-Fal-Error-Type": exc.type}
    if isinstance(exc, StartTimeout):
        headers["X-Fal-Request-Timeout-Type"] = "user"  # tells both clients not to retry
    return Failure(exc.status, {"detail": exc.message, "error_type": exc.type}, exc.message, exc.type, headers)
