"""The input of fal-ai/animatediff-sparsectrl-lcm. Facts: `video-models.md` section 3."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic_core import InitErrorDetails, PydanticCustomError, PydanticKnownError

from deployments.schemas.description import Endpoint, VideoOutput
from deployments.schemas.inputs import EMPTY_IS_NONE, NOT_BOOL, EndpointInput, Int, Number, OptionalMediaUrl, Text
from engines.animatediff.config import API_FRAMES, AnimateDiffConfig
from engines.animatediff.demand import UNIT_TIMES, check_memory, demand
from engines.animatediff.spec import AnimateDiffSpec, Keyframe
from engines.demand import Demand

FrameIndex = Annotated[Annotated[int, Field(ge=0, lt=API_FRAMES), NOT_BOOL] | None, EMPTY_IS_NONE]


def _not_blank(value: str) -> str:
    if not value.strip():
        raise PydanticKnownError("string_too_short", {"min_length": 1})
    return value


class AnimateDiffInput(EndpointInput):
    """A clip of 16 frames from text and up to three keyframes."""

    prompt: Annotated[Text, AfterValidator(_not_blank)] = Field(
        description="What to show; cut after 75 tokens.", examples=["Drone footage, futuristic city at night"]
    )
    negative_prompt: Text = Field("", description="What to avoid; only used with a guidance scale above 1.")
    controlnet_type: Literal["scribble", "rgb"] = Field(
        "scribble", description="How to read the keyframes: white lines on black, or full pictures."
    )
    num_inference_steps: Int = Field(4, ge=1, le=50, description="LCM steps; 2 to 12 are useful.")
    guidance_scale: Number = Field(1, ge=1, le=10, description="Above 1 each step costs twice as much.")
    keyframe_0_image_url: OptionalMediaUrl = Field(None, description="Image URL or data URI.")
    keyframe_0_index: FrameIndex = Field(None, description="The frame that the image is for.", examples=[0])
    keyframe_1_image_url: OptionalMediaUrl = Field(None, description="Image URL or data URI.")
    keyframe_1_index: FrameIndex = Field(None, description="The frame that the image is for.", examples=[8])
    keyframe_2_image_url: OptionalMediaUrl = Field(None, description="Image URL or data URI.")
    keyframe_2_index: FrameIndex = Field(None, description="The frame that the image is for.", examples=[15])

    def _keyframes(self) -> list[tuple[int, str | None, int | None]]:
        return [(k, getattr(self, f"keyframe_{k}_image_url"), getattr(self, f"keyframe_{k}_index")) for k in range(3)]

    def faults(self) -> list[InitErrorDetails]:
        """A keyframe is an image and an index; no two keyframes share a frame.

        A keyframe whose URL was sent empty is not used, whatever its index.
        """
        found: list[InitErrorDetails] = []
        taken: dict[int, int] = {}
        for k, url, index in self._keyframes():
            image_field, index_field = f"keyframe_{k}_image_url", f"keyframe_{k}_index"
            if url is not None and index is None:
                message = PydanticCustomError("missing", "{given} needs {absent}", {"given": image_field, "absent": index_field})
                found.append(InitErrorDetails(type=message, loc=(index_field,), input=None))
            if index is not None and url is None and image_field not in self.model_fields_set:
                message = PydanticCustomError("missing", "{given} needs {absent}", {"given": index_field, "absent": image_field})
                found.append(InitErrorDetails(type=message, loc=(image_field,), input=None))
            if url is not None and index is not None and (first := taken.setdefault(index, k)) != k:
                message = PydanticCustomError(
                    "value_error", "frame {index} is already taken by keyframe_{first}_index", {"index": index, "first": first}
                )
                found.append(InitErrorDetails(type=message, loc=(index_field,), input=index))
        return found

    def demand(self) -> Demand:
        """The clip's steps."""
        return demand(steps=self.num_inference_steps, guidance_scale=self.guidance_scale)

    def check_memory(self, config: AnimateDiffConfig) -> None:
        """Blames the guidance, or nothing that the caller can change."""
        check_memory(config, guidance_scale=self.guidance_scale)

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


ENDPOINT = Endpoint(
    id="fal-ai/animatediff-sparsectrl-lcm",
    model="animatediff-sparsectrl-lcm",
    family="animatediff",
    title="AnimateDiff SparseCtrl LCM",
    category="text-to-video",
    input=AnimateDiffInput,
    output=VideoOutput,
    config=AnimateDiffConfig,
    unit_times=UNIT_TIMES,
    realtime=True,
)
