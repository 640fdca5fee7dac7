"""What the inputs of all endpoints have in common: the base class, and the types of their fields.

Facts: `fal-queue-protocol.md` section 0, `video-models.md` section 3.
"""

import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Self, TypeVar, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import InitErrorDetails, PydanticKnownError, from_json

from deployments.schemas.failures import MAX_FAULTS, shortened
from engines.demand import Demand
from engines.spec import RenderSpec

MAX_TEXT_CHARS = 2000
"""Of a prompt, of which a model reads 75 tokens."""

INPUT_VERSION = 1
"""Of all endpoints' fields; stored with every job. Increase it when a field is added, removed or changes its meaning."""

KEPT = "kept:"
"""Begins a stored input's reference to a file of its own in the file store. No caller can send one."""


def _no_bool(value: object) -> object:
    if isinstance(value, bool):  # pydantic would read true as 1
        raise PydanticKnownError("int_type")
    return value


def _fetchable(value: str) -> str:
    if not value.lower().startswith(("http://", "https://", "data:")):
        raise PydanticKnownError("url_scheme", {"expected_schemes": "'http', 'https' or 'data'"})
    return value


def _none_if_empty(value: object) -> object:
    return None if isinstance(value, str) and not value.strip() else value


def _cut(value: str) -> str:
    return value if len(value) <= MAX_TEXT_CHARS else " ".join(value.split())[:MAX_TEXT_CHARS]


def _none_if_random(value: int | None) -> int | None:
    return None if value == -1 else value


NOT_BOOL = BeforeValidator(_no_bool)
EMPTY_IS_NONE = BeforeValidator(_none_if_empty)
"""For optional fields: forms send all their fields, the unused ones empty."""
Int = Annotated[int, NOT_BOOL]
Seed = Annotated[Annotated[int, Field(ge=-1, le=2**63 - 1), NOT_BOOL] | None, EMPTY_IS_NONE, AfterValidator(_none_if_random)]
"""-1 is what many tools send for "draw one"."""
Bool = Annotated[bool, Field(strict=True)]
Number = Annotated[float, NOT_BOOL, Field(allow_inf_nan=False)]
Text = Annotated[str, AfterValidator(_cut)]
"""A longer text is cut, and the job's log says so."""
MediaUrl = Annotated[str, AfterValidator(_fetchable), Field(json_schema_extra={"pattern": "^(https?://|data:)"})]
OptionalMediaUrl = Annotated[MediaUrl | None, EMPTY_IS_NONE]

I = TypeVar("I", bound="EndpointInput")  # noqa: E741


@dataclass(frozen=True)
class Parsed(Generic[I]):
    """What a request body holds. ignored: names of fields that the endpoint does not have, shortened, the first few of them.

    notes: for the job's log: what was ignored and what was cut.
    """

    input: I
    ignored: tuple[str, ...]
    notes: tuple[str, ...]


class EndpointInput(BaseModel):
    """What every endpoint's input can do. Unknown fields are ignored, because generic tools send the same ones everywhere."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    seed: Seed = Field(None, description="Same seed and input, same video; -1 draws one.", examples=[42])

    @classmethod
    def parse(cls, body: bytes | bytearray, *, refuse_unknown: bool = False) -> Parsed[Self]:
        """The input in a request body; an empty body is {}. Raises pydantic's `ValidationError`, with a loc for each fault.

        Pydantic is given no more than a few unknown fields: it would tell of each. refuse_unknown: they are faults.
        """
        given = cls._object(body)
        known = {name: value for name, value in given.items() if name in cls.model_fields}
        unknown = [name for name in given if name not in cls.model_fields]
        told = unknown[:MAX_FAULTS]
        extra = {name: given[name] for name in told} if refuse_unknown else {}
        parsed = cls.model_validate(known | extra, extra="forbid" if refuse_unknown else None)
        if faults := parsed.faults():
            raise ValidationError.from_exception_data(cls.__name__, faults)
        ignored = tuple(map(shortened, told))
        notes = [_cut_note(name, len(value)) for name, value in known.items() if parsed._is_cut(name, value)]
        return Parsed(parsed, ignored, (*_ignored_notes(ignored, len(unknown)), *notes))

    @classmethod
    def of_query(cls, query: Mapping[str, str]) -> dict[str, str | bool]:
        """The fields in a query, where everything is text; numbers are parsed with the rest."""
        switches = {name for name, field in cls.model_fields.items() if field.annotation is bool}
        words = {"true": True, "false": False}
        return {name: words.get(value, value) if name in switches else value for name, value in query.items()}

    @classmethod
    def stored(cls, job_input: dict[str, Any]) -> Self:
        """The input in a job's row, not validated again: an upgrade may have changed the schema while the job waited.

        Fields that this version does not know are ignored, and those that it has added have their defaults.
        """
        return cast("Self", cls.model_construct(**job_input))  # pydantic's plugin for mypy says "EndpointInput"

    @classmethod
    def unread(cls, job_input: Mapping[str, Any], version: int) -> str | None:
        """A line for the log of a job of another version, whose row has fields that this one ignores; None: there are none."""
        names = [shortened(name) for name in job_input if name not in cls.model_fields]
        if not names:
            return None
        return f"accepted under version {version} of the inputs; this service has {INPUT_VERSION} and ignores {', '.join(names)}"

    @classmethod
    def _object(cls, body: bytes | bytearray) -> dict[str, Any]:
        try:
            given = from_json(body or b"{}")
        except ValueError as exc:
            fault = InitErrorDetails(type="json_invalid", ctx={"error": str(exc)}, loc=(), input=None)
            raise ValidationError.from_exception_data(cls.__name__, [fault]) from None
        if not isinstance(given, dict):
            cls.model_validate(given)  # raises
        return dict(given)

    def _is_cut(self, name: str, value: object) -> bool:
        return isinstance(value, str) and len(value) > MAX_TEXT_CHARS and len(str(getattr(self, name))) == MAX_TEXT_CHARS

    def faults(self) -> list[InitErrorDetails]:
        """Errors between fields that are each valid by themselves."""
        return []

    def resolved(self) -> Self:
        """The input with a random seed if the caller gave none, so that a retry renders the same video.

        The seed has 32 bits, because JavaScript callers read it as a double.
        """
        return self if self.seed is not None else self.model_copy(update={"seed": secrets.randbits(32)})

    def demand(self) -> Demand:
        """The work in this request; one unit a stage by default."""
        return Demand()

    def check_memory(self, config: Any) -> None:
        """Raises `ValueTooLarge` if no replica with this config of the model can ever have the memory; never by default."""

    def media(self) -> dict[str, str]:
        """Field name -> URL, data URI or, in a stored input, reference of every file to fetch; none by default."""
        return {}

    def spec(self, media: Mapping[str, Path]) -> RenderSpec:
        """What to render. media: field -> file, for each field of `media()`; the files are read here, or later by the model."""
        raise NotImplementedError


def _ignored_notes(names: Collection[str], count: int) -> list[str]:
    if not names:
        return []
    more = f" and {count - len(names)} more" if count > len(names) else ""
    return [f"ignored, because this endpoint has no such fields: {', '.join(names)}{more}"]


def _cut_note(name: str, length: int) -> str:
    return f"{name} has {length} characters, of which only the first {MAX_TEXT_CHARS} are used"
