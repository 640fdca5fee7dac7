"""What the queue answers, for the OpenAPI documents; `responses.py` makes the answers themselves."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, Field


class LogItem(BaseModel):
    """A line of a request's log."""

    message: str
    level: str = Field(description="STDERR, STDOUT, ERROR, INFO, WARN or DEBUG.")
    source: str
    labels: dict[str, str]
    timestamp: datetime
    seq: int = Field(description="1, 2, 3 and so on within the request.")
    progress: dict[str, Any] | None = Field(None, description="The same for programs, where the line tells of progress.")


class QueueStatus(BaseModel):
    """Where a request stands. Every end is COMPLETED; a failed one has `error`, and its result answers the failure."""

    status: Literal["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]
    request_id: str
    gateway_request_id: str | None = None
    response_url: str
    status_url: str
    cancel_url: str
    queue_position: int | None = Field(None, ge=0, description="How many requests of the endpoint are ahead, while it waits.")
    logs: list[LogItem] | None = Field(None, description="Null unless they were asked for.")
    metrics: dict[str, Any] = Field({}, description="`inference_time` in seconds, once it is completed.")
    error: str | None = None
    error_type: str | None = None


class CancelAnswer(BaseModel):
    """What became of a cancel."""

    status: Literal["CANCELLATION_REQUESTED", "ALREADY_COMPLETED", "NOT_FOUND"]


class Fault(BaseModel):
    """One thing that is wrong with an input."""

    loc: list[str | int] = Field(description="Path to the field.")
    msg: str
    type: str
    url: str
    ctx: dict[str, Any] | None = None
    input: Any = None


class ModelFailure(BaseModel):
    """An input that the model cannot serve."""

    detail: list[Fault]


class RequestFailure(BaseModel):
    """A request that could not be served."""

    detail: str
    error_type: str


class NotFoundAnswer(BaseModel):
    """There is no such request, or it is another caller's."""

    status: Literal["NOT_FOUND", "ALREADY_COMPLETED"]


class PlatformError(BaseModel):
    """What went wrong, in the words of fal's platform API."""

    type: str
    message: str
    docs_url: str | None
    request_id: str


class PlatformFailure(BaseModel):
    """A failed request to `/v1`."""

    error: PlatformError


FAILURES = ModelFailure | RequestFailure | NotFoundAnswer | PlatformFailure
"""The shapes of every answer that is not a success."""
