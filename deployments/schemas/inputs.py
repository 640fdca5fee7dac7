"""What the inputs of all endpoints have in common: the base class, and the types of their fields.

Facts: `fal-queue-protocol.md` section 0, `video-models.md` section 3.
"""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import InitErrorDetails, PydanticKnownError

from engines.spec import RenderSpec


def _no_bool(value: object) -> object:
    if isinstance(value, bool):  # pydantic would read true as 1
        raise PydanticKnownError("int_type")
    return value


def _fetchable(value: str) -> str:
    if not value.lower().startswith(("http://", "https://", "data:")):
        raise PydanticKnownError("url_scheme", {"expected_schemes": "'http', 'https' or 'data'"})
    return value


Seed = Annotated[int | None, BeforeValidator(_no_bool), Field(ge=0, le=2**63 - 1)]
Int = Annotated[int, BeforeValidator(_no_bool)]
Bool = Annotated[bool, Field(strict=True)]
Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
MediaUrl = Annotated[str, AfterValidator(_fetchable)]


class EndpointInput(BaseModel):
    """What every endpoint's input can do. Unknown fields are refused, so that a misspelt one is not silently ignored."""

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
        """Errors between fields that are each valid by themselves."""
        return []

    def resolved(self) -> Self:
        """The input with a random seed if the caller gave none, so that a retry renders the same video.

        The seed has 32 bits, because JavaScript callers read it as a double.
        """
        return self if self.seed is not None else self.model_copy(update={"seed": secrets.randbits(32)})

    def media(self) -> dict[str, str]:
        """Field name -> URL or data URI of every file to fetch."""
        raise NotImplementedError

    def spec(self, media: Mapping[str, Path]) -> RenderSpec:
        """What to render. media: field -> file, for each field of `media()`; the files are read here, or later by the model."""
        raise NotImplementedError
