"""The catalogue of endpoints, and a key's history of requests, as in fal's platform API. fal-queue-protocol.md, section 7."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal
from uuid import UUID

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from deployments.schemas.description import Endpoint
from deployments.schemas.failures import Failure
from deployments.schemas.inputs import KEPT
from deployments.schemas.openapi import queue_document
from deployments.schemas.responses import with_absolute_urls
from engines.errors import BadRequest, NotFound

MAX_LIMIT, LIMIT = 100, 50
MAX_IDS = 50
WINDOW = timedelta(days=1)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TIME = TypeAdapter(datetime)

Status = Literal["success", "error", "user_error"]
"""How a request ended: with its output, by a fault of the service (5xx), or of its caller (4xx, a cancel included)."""


class Metadata(BaseModel):
    """What people want to know of an endpoint."""

    display_name: str
    category: str
    description: str
    status: Literal["active"] = "active"
    tags: list[str] = []
    model_url: str


class ModelEntry(BaseModel):
    """One endpoint."""

    endpoint_id: str
    metadata: Metadata
    openapi: dict[str, Any] | None = Field(None, description="Its OpenAPI document, with `expand=openapi-3.0`.")


class ModelPage(BaseModel):
    """A page of the catalogue."""

    models: list[ModelEntry]
    next_cursor: str | None
    has_more: bool


class HistoryItem(BaseModel):
    """One request that has ended. Times are UTC."""

    request_id: UUID
    endpoint_id: str
    sent_at: datetime
    started_at: datetime | None
    ended_at: datetime
    status_code: int = Field(description="Of its result.")
    duration: float | None = Field(description="From its last start to its end, in seconds.")
    json_input: dict[str, Any] | None = Field(None, description="With `expand=payloads`; files that came with it are null.")
    json_output: dict[str, Any] | None = Field(None, description="With `expand=payloads`.")


class HistoryPage(BaseModel):
    """A page of a key's history, newest end first."""

    items: list[HistoryItem]
    next_cursor: str | None
    has_more: bool


@dataclass(frozen=True)
class Ended:
    """A job that has ended, as the store knows it. input, result: where they were asked for."""

    id: UUID
    endpoint: str
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime
    failure: Failure | None
    input: dict[str, Any] | None
    result: dict[str, Any] | None


@dataclass(frozen=True)
class HistoryQuery:
    """Which part of a history: ended from `start` until before `end`, after the place `after`, at most `limit` of them."""

    endpoint: str
    start: datetime
    end: datetime
    statuses: tuple[str, ...] | None
    request_id: UUID | None
    after: tuple[datetime, UUID] | None
    limit: int
    payloads: bool


def model_page(endpoints: Iterable[Endpoint], query: Mapping[str, str], ids: Sequence[str], urls: tuple[str, str]) -> ModelPage:
    """The endpoints that a query asks for, by id. ids: its `endpoint_id`s. urls: of the queue and of the service.

    Raises `BadRequest`.
    """
    if len(ids) > MAX_IDS:
        raise BadRequest(f"endpoint_id may be given {MAX_IDS} times.")
    _one_of("status", query, ("active", "deprecated"))
    expanded = _one_of("expand", query, ("openapi-3.0", "enterprise_status")) == "openapi-3.0"
    words, limit = query.get("q", "").lower().split(), _limit(query)
    found = [
        endpoint
        for endpoint in sorted(endpoints, key=lambda each: each.id)
        if (not ids or endpoint.id in ids)
        and query.get("category", endpoint.category) == endpoint.category
        and query.get("status", "active") == "active"
        and all(word in f"{endpoint.id} {endpoint.title} {endpoint.description}".lower() for word in words)
        and endpoint.id > query.get("cursor", "")
    ]
    page, more = found[:limit], len(found) > limit
    models = [_entry(endpoint, expanded, urls) for endpoint in page]
    return ModelPage(models=models, next_cursor=page[-1].id if more else None, has_more=more)


def read_history_query(query: Mapping[str, str], endpoints: Iterable[str], now: datetime) -> HistoryQuery:
    """What a request for a history asks for; without times, the last day. Raises `BadRequest`, `NotFound`."""
    endpoint = query.get("endpoint_id", "")
    if not endpoint:
        raise BadRequest("endpoint_id must be given.")
    if endpoint not in endpoints:
        raise NotFound(f"There is no endpoint {endpoint[:100]}.")
    statuses = tuple(filter(None, query.get("status", "").split(",")))
    if unknown := set(statuses) - {"success", "error", "user_error"}:
        raise BadRequest(f"status must be success, error or user_error, not {sorted(unknown)[0][:100]}.")
    end = _time("end", query, now)
    return HistoryQuery(
        endpoint,
        _time("start", query, max(end, _EPOCH + WINDOW) - WINDOW),
        end,
        statuses or None,
        _request_id(query.get("request_id")),
        _place(query.get("cursor")),
        _limit(query),
        _one_of("expand", query, ("payloads",)) == "payloads",
    )


def history_page(found: Sequence[Ended], asked: HistoryQuery, service_url: str) -> HistoryPage:
    """found: one more than were asked for, if there are so many."""
    page, more = found[: asked.limit], len(found) > asked.limit
    cursor = f"{(page[-1].finished_at - _EPOCH) // timedelta(microseconds=1)}-{page[-1].id.hex}" if more else None
    return HistoryPage(items=[_item(ended, service_url) for ended in page], next_cursor=cursor, has_more=more)


def _entry(endpoint: Endpoint, expanded: bool, urls: tuple[str, str]) -> ModelEntry:
    about = Metadata(
        display_name=endpoint.title,
        category=endpoint.category,
        description=endpoint.description,
        model_url=f"{urls[0]}/{endpoint.id}",
    )
    return ModelEntry(endpoint_id=endpoint.id, metadata=about, openapi=queue_document(endpoint, *urls) if expanded else None)


def _item(ended: Ended, service_url: str) -> HistoryItem:
    job_input = ended.input and {
        field: None if isinstance(value, str) and value.startswith(KEPT) else value for field, value in ended.input.items()
    }
    return HistoryItem(
        request_id=ended.id,
        endpoint_id=ended.endpoint,
        sent_at=ended.created_at,
        started_at=ended.started_at,
        ended_at=ended.finished_at,
        status_code=ended.failure.status if ended.failure else 200,
        duration=None if ended.started_at is None else round((ended.finished_at - ended.started_at).total_seconds(), 3),
        json_input=job_input,
        json_output=ended.result and with_absolute_urls(ended.result, service_url),
    )


def _one_of(name: str, query: Mapping[str, str], allowed: tuple[str, ...]) -> str | None:
    value = query.get(name)
    if value is not None and value not in allowed:
        raise BadRequest(f"{name} must be {' or '.join(allowed)}.")
    return value


def _limit(query: Mapping[str, str]) -> int:
    value = query.get("limit", str(LIMIT))
    if not (value.isascii() and value.isdecimal() and len(value) < 10 and 1 <= int(value) <= MAX_LIMIT):
        raise BadRequest(f"limit must be a whole number from 1 to {MAX_LIMIT}.")
    return int(value)


def _time(name: str, query: Mapping[str, str], default: datetime) -> datetime:
    if name not in query:
        return default
    try:
        time = _TIME.validate_python(query[name].replace(" ", "+"))  # a plus sign that was not escaped in the query
        return time.replace(tzinfo=time.tzinfo or UTC).astimezone(UTC)
    except (ValidationError, OverflowError, ValueError):
        raise BadRequest(f"{name} must be a time in ISO 8601.") from None


def _request_id(value: str | None) -> UUID | None:
    try:
        return None if value is None else UUID(value)
    except ValueError:
        raise BadRequest("request_id must be a UUID.") from None


def _place(cursor: str | None) -> tuple[datetime, UUID] | None:
    if not cursor:
        return None
    microseconds, _, job_id = cursor.partition("-")
    try:
        return _EPOCH + timedelta(microseconds=int(microseconds)), UUID(job_id)
    except (ValueError, OverflowError):
        raise BadRequest("cursor must be a page's next_cursor.") from None
