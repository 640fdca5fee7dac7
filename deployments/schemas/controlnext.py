"""The input of fal-ai/controlnext. Facts: `video-models.md` section 3."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import Field
from pydantic_core import InitErrorDetails, PydanticCustomError

from deployments.schemas.description import Endpoint, VideoOutput
from deployments.schemas.inputs import Bool, EndpointInput, Int, MediaUrl, Number
from engines.controlnext.config import ControlNeXtConfig
from engines.controlnext.demand import UNIT_TIMES, check_memory, demand
from engines.controlnext.spec import IMAGE_FIELD, VIDEO_FIELD, ControlNeXtSpec
from engines.demand import Demand

MAX_AREA = 1024 * 576
"""Pixels of a ControlNeXt frame: what the model was trained on. Larger ones cost memory and look worse."""


class ControlNeXtInput(EndpointInput):
    """A video of the person in a reference image, moving as in a driving video."""

    image_url: MediaUrl = Field(description="The reference image: URL or data URI. It is cropped to the output's aspect ratio.")
    video_url: MediaUrl = Field(description="The driving video: URL or data URI. Its poses are fitted to the reference's body.")
    height: Int = Field(1024, ge=256, le=1024, multiple_of=64, description="Of the output, in pixels.")
    width: Int = Field(576, ge=256, le=1024, multiple_of=64, description="Of the output, in pixels.")
    guidance_scale: Number = Field(3, ge=1, le=10, description="At 1 each step costs half as much.")
    num_inference_steps: Int = Field(25, ge=1, le=50, description="Denoising steps.")
    max_frame_num: Int = Field(
        240,
        ge=2,
        le=240,
        description="The most frames of the output: frame 0, which shows the reference, and up to 239 driven ones.",
    )
    batch_frames: Int = Field(24, ge=2, le=32, description="Frames that are denoised together.")
    overlap: Int = Field(6, ge=1, description="Frames that neighbouring batches share; less than batch_frames.")
    sample_stride: Int = Field(2, ge=1, le=8, description="Every n-th frame of the driving video is used.")
    decode_chunk_size: Int = Field(2, ge=1, le=32, description="Frames that the VAE decodes together; larger flickers less.")
    motion_bucket_id: Number = Field(127, ge=0, le=255, description="How much motion the model is told to expect.")
    fps: Int = Field(7, ge=1, le=60, description="Frame rate of the output, and an input of the model.")
    controlnext_cond_scale: Number = Field(1, ge=0, le=2, description="Strength of the poses; 0 leaves them out.")
    video_is_pose: Bool = Field(False, description="The driving video already shows drawn poses, which are used as they are.")
    strict_reference: Bool = Field(
        False, description="As the published code: conditions (6, 128, 0.02), poses fitted to the whole video, everybody drawn."
    )

    def faults(self) -> list[InitErrorDetails]:
        """Batches must overlap by less than their length; a frame must not be larger than the model's."""
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

    def demand(self) -> Demand:
        """The frames' poses, the units of all steps, the frames to decode."""
        return demand(
            height=self.height,
            width=self.width,
            frames=self.max_frame_num,
            batch_frames=self.batch_frames,
            overlap=self.overlap,
            steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
        )

    def check_memory(self, config: ControlNeXtConfig) -> None:
        """Blames the frames of a window or of a chunk."""
        check_memory(
            config,
            height=self.height,
            width=self.width,
            frames=self.max_frame_num,
            batch_frames=self.batch_frames,
            decode_chunk_size=self.decode_chunk_size,
        )

    def media(self) -> dict[str, str]:
        """The image and the video."""
        return {IMAGE_FIELD: self.image_url, VIDEO_FIELD: self.video_url}

    def spec(self, media: Mapping[str, Path]) -> ControlNeXtSpec:
        """The video to render. Call it on a resolved input."""
        assert self.seed is not None
        return ControlNeXtSpec(
            image=media[IMAGE_FIELD], video=media[VIDEO_FIELD], **self.model_dump(exclude={"image_url", "video_url"})
        )


ENDPOINT = Endpoint(
    id="fal-ai/controlnext",
    model="controlnext",
    family="controlnext",
    title="ControlNeXt SVD",
    category="video-to-video",
    input=ControlNeXtInput,
    output=VideoOutput,
    config=ControlNeXtConfig,
    unit_times=UNIT_TIMES,
)
