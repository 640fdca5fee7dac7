"""Webhooks as the owner of their jobs sees them: a list in pages, and one webhook with the log of its attempts."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from deployments.webhooks.outbox import Attempt, Webhook
from engines.errors import BadRequest

MAX_LIMIT = 100
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_BEGIN = (_EPOCH, UUID(int=0))


def start(since: str, cursor: str) -> tuple[datetime, UUID]:
    """The place in the order of webhooks after which a page begins. Raises `BadRequest`."""
    try:
        if cursor:
            microseconds, _, job_id = cursor.partition("-")
            return _EPOCH + timedelta(microseconds=int(microseconds)), UUID(job_id)
        return (_time(since), UUID(int=0)) if since else _BEGIN
    except (ValueError, OverflowError):
        wanted = "cursor must be a page's next_cursor" if cursor else "since must be a time in ISO 8601 or seconds since 1970"
        raise BadRequest(f"{wanted}.") from None


def limit(value: str) -> int:
    """How many webhooks a page may have. Raises `BadRequest`."""
    if not (value.isascii() and value.isdecimal() and len(value) < 10 and 1 <= int(value) <= MAX_LIMIT):
        raise BadRequest(f"limit must be a whole number from 1 to {MAX_LIMIT}.")
    return int(value)


def page(webhooks: Sequence[Webhook], after: tuple[datetime, UUID]) -> dict[str, Any]:
    """A page of the list. Its cursor is never null: the last page's leads to the webhooks that come later."""
    created_at, job_id = (webhooks[-1].created_at, webhooks[-1].job_id) if webhooks else after
    cursor = f"{(created_at - _EPOCH) // timedelta(microseconds=1)}-{job_id.hex}"
    return {"deliveries": [entry(webhook) for webhook in webhooks], "next_cursor": cursor}


def entry(webhook: Webhook) -> dict[str, Any]:
    """A webhook in the list. `webhook` is its body, null before the first attempt."""
    return {
        "request_id": str(webhook.job_id),
        "url": webhook.url,
        "status": webhook.status,
        "created_at": _iso(webhook.created_at),
        "next_attempt_at": webhook.next_attempt_at and _iso(webhook.next_attempt_at),
        "delivered_at": webhook.delivered_at and _iso(webhook.delivered_at),
        "attempts": webhook.attempts,
        "last_status": webhook.last_status,
        "last_error": webhook.last_error,
        "webhook": webhook.body and json.loads(webhook.body),
    }


def log(attempts: Sequence[Attempt]) -> list[dict[str, Any]]:
    """A webhook's attempts; one whose courier died is missing."""
    return [
        {
            "at": _iso(tried.at),
            "attempt": tried.attempt,
            "status": tried.status,
            "error": tried.error,
            "duration_s": round(tried.duration_s, 3),
        }
        for tried in attempts
    ]


def _time(value: str) -> datetime:
    """Raises ValueError, or OverflowError."""
    try:
        return _EPOCH + timedelta(seconds=float(value))
    except ValueError:
        time = datetime.fromisoformat(value.replace(" ", "+"))  # a plus sign that was not escaped in the query
        return time.replace(tzinfo=time.tzinfo or UTC).astimezone(UTC)


def _iso(time: datetime) -> str:
    return time.astimezone(UTC).isoformat()
