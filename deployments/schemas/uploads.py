"""What callers say about a file: its type and name, how long it is kept, who may read it. fal-queue-protocol.md, section 4."""

import json
import math
import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, ValidationError

from engines.errors import BadRequest

UNKNOWN_TYPE = "application/octet-stream"
MAX_KEEP_S = 100 * 365 * 86_400.0
MAX_PARTS = 10_000
MAX_NAME_CHARS = 1000
MAX_TYPE_CHARS = 255
MAX_LIFECYCLE_CHARS = 16_000
"""All headers of a request together are 16 kB at most."""

Decision = Literal["allow", "forbid", "hide"]

_WORD = r"[\w!#$&^.+-]+"
_VALUE = r'(?:[\w./+:-]+|"[\w ./+:-]*")'
_TYPE = re.compile(rf"{_WORD}/{_WORD}(?: *; *[\w.-]+={_VALUE})*", re.ASCII)
_ACTIVE = re.compile(r"html|script|svg|css|xsl|shockwave|[/+]xml|multipart/|message/", re.IGNORECASE)


def _media_type(value: str) -> str:
    if len(value) > MAX_TYPE_CHARS or not _TYPE.fullmatch(value):
        raise ValueError("not a media type")
    return value


class UploadRequest(BaseModel):
    """The file that an upload URL is asked for. Unknown fields are ignored. file_size: in bytes; the upload must be so long."""

    model_config = ConfigDict(frozen=True)

    content_type: Annotated[str, AfterValidator(_media_type)] = UNKNOWN_TYPE
    file_name: str = Field("upload.bin", max_length=MAX_NAME_CHARS)
    file_size: Annotated[int, Field(ge=0, le=2**53, strict=True)] | None = None


class UploadedPart(BaseModel):
    """A part as its uploader names it. etag: with or without its quotes."""

    model_config = ConfigDict(frozen=True)

    partNumber: int = Field(ge=1, le=MAX_PARTS, strict=True)  # noqa: N815  (on the wire)
    etag: str = Field(max_length=200)


class UploadedParts(BaseModel):
    """The parts that make up a file, in any order."""

    model_config = ConfigDict(frozen=True)

    parts: Annotated[list[UploadedPart], FailFast()] = Field(min_length=1, max_length=MAX_PARTS)

    def in_order(self) -> list[UploadedPart]:
        """By their numbers. Raises `BadRequest` if one is there twice."""
        ordered = sorted(self.parts, key=lambda part: part.partNumber)
        if len({part.partNumber for part in ordered}) < len(ordered):
            raise BadRequest("A part is named twice.")
        return ordered


class _Rule(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    user: str = Field(min_length=1, max_length=200)
    decision: Decision


class AccessRules(BaseModel):
    """fal's `initial_acl`: the first rule for the id of a reader's API key counts, else the default.

    Unknown fields are refused: one might be meant to restrict it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    default: Decision = "allow"
    rules: list[_Rule] = Field([], max_length=100)

    def decision(self, user: str | None) -> Decision:
        """What is decided for the API key of this id. user: None if the reader showed none."""
        return next((rule.decision for rule in self.rules if rule.user == user), self.default)

    @property
    def restricts(self) -> bool:
        """Whether anybody is kept from reading."""
        return self.default != "allow" or any(rule.decision != "allow" for rule in self.rules)


@dataclass(frozen=True)
class Lifecycle:
    """What the caller wants for a file. keep_s: in seconds; None: nothing is asked for. access: None: everybody may read it."""

    keep_s: float | None = None
    access: AccessRules | None = None


def read_lifecycle(value: str | None, header: str = "X-Fal-Object-Lifecycle-Preference") -> Lifecycle:
    """A lifecycle header. Raises `BadRequest`."""
    if value is None:
        return Lifecycle()
    try:
        if len(value) > MAX_LIFECYCLE_CHARS:
            raise ValueError
        wish = json.loads(value)
        seconds, access = wish.get("expiration_duration_seconds"), wish.get("initial_acl")
    except (ValueError, AttributeError, RecursionError):
        raise BadRequest(f"{header} must be a JSON object.") from None
    if seconds is not None and (isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf):
        raise BadRequest("expiration_duration_seconds must be a number of seconds, above 0.")
    keep_s = None if seconds is None else float(min(seconds, MAX_KEEP_S))
    return Lifecycle(keep_s, _access(access))


def _access(value: object) -> AccessRules | None:
    if value is None:
        return None
    try:
        rules = AccessRules.model_validate(value)
    except ValidationError:
        raise BadRequest(
            'initial_acl must be {"default": "allow", "forbid" or "hide", "rules": [{"user": a key\'s id, "decision": ...}]}.'
        ) from None
    return rules if rules.restricts else None


def media_type(value: str | None) -> str:
    """A Content-Type header; nothing is `UNKNOWN_TYPE`. Raises `BadRequest`."""
    try:
        return _media_type(value) if value else UNKNOWN_TYPE
    except ValueError:
        raise BadRequest("Content-Type is not a media type.") from None


def same_type(one: str, other: str) -> bool:
    """Whether two media types are the same, whatever their letters' case and spaces."""
    return "".join(one.lower().split()) == "".join(other.lower().split())


def served_type(content_type: str) -> str:
    """The type that a file is served with: the one that it was sent with, unless browsers can run files of that type."""
    return UNKNOWN_TYPE if _ACTIVE.search(content_type) else content_type
