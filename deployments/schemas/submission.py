"""What a submission asks for beside its input: fal's headers and query parameters. fal-queue-protocol.md, section 2.1.

Options that promise nothing here are accepted and have no effect: runner hints, files' access rules, retry configs, fallbacks.
"""

import hashlib
import json
import math
import unicodedata
from collections.abc import Mapping
from contextlib import suppress

import httpx

from deployments.jobs.job import Idempotency, NewJob
from engines.errors import BadRequest

PRIORITIES = {"normal": 0, "low": 1}
MAX_START_TIMEOUT_S = 365 * 86_400.0
MAX_KEY_CHARS = 255
MAX_FILES_S = 100 * 365 * 86_400.0


def new_job(endpoint: str, owner: str | None, headers: Mapping[str, str], query: Mapping[str, str], max_attempts: int) -> NewJob:
    """The job, its input still empty. headers: looked up in lower case. Raises `BadRequest`."""
    return NewJob(
        endpoint=endpoint,
        input={},
        owner=owner,
        priority=_priority(headers.get("x-fal-queue-priority", "normal")),
        start_timeout_s=_start_timeout_s(headers.get("x-fal-request-timeout")),
        max_attempts=1 if is_set(headers.get("x-fal-no-retry", "")) else max_attempts,
        webhook_url=_webhook_url(query.get("fal_webhook")),
        files_s=_files_s(headers.get("x-fal-object-lifecycle-preference")),
        store_io=headers.get("x-fal-store-io", "1").lower() not in ("0", "false", "no"),
    )


def idempotency(headers: Mapping[str, str], endpoint: str, body: bytes, keep_s: float) -> Idempotency | None:
    """What makes this submission repeatable, if its caller asks for that. Check the key with `idempotency_key` before."""
    key = idempotency_key(headers)
    return None if key is None else Idempotency(key, _fingerprint(endpoint, body), keep_s)


def idempotency_key(headers: Mapping[str, str]) -> str | None:
    """The caller's key: 1 to 255 printable characters. Raises `BadRequest`."""
    key = headers.get("idempotency-key")
    if key is None:
        return None
    if not 1 <= len(key) <= MAX_KEY_CHARS or any(unicodedata.category(character) == "Cc" for character in key):
        raise BadRequest(f"Idempotency-Key must be 1 to {MAX_KEY_CHARS} characters, none of them a control character.")
    return key


def max_queue_length(query: Mapping[str, str]) -> int | None:
    """How many requests may wait before this one. Raises `BadRequest`."""
    value = query.get("fal_max_queue_length")
    if value is None:
        return None
    if not (value.isascii() and value.isdecimal() and len(value) < 10):
        raise BadRequest("fal_max_queue_length must be a whole number, 0 or more.")
    return int(value)


def is_set(flag: str) -> bool:
    """A flag as either client writes it: 1 or 0, true or false."""
    return flag.lower() in ("1", "true", "yes")


def _fingerprint(endpoint: str, body: bytes) -> bytes:
    """Equal for bodies of equal JSON: a caller who writes the request anew need not keep the order of its fields."""
    with suppress(ValueError, RecursionError):  # what is no JSON is its bytes
        body = json.dumps(json.loads(body or b"{}"), sort_keys=True).encode()
    return hashlib.sha256(endpoint.encode() + b"\0" + body).digest()


def _priority(value: str) -> int:
    if value.lower() not in PRIORITIES:
        raise BadRequest("X-Fal-Queue-Priority must be normal or low.")
    return PRIORITIES[value.lower()]


def _start_timeout_s(value: str | None) -> float | None:
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= MAX_START_TIMEOUT_S:  # not a number compares false as well
        raise BadRequest("X-Fal-Request-Timeout must be a number of seconds, above 0 and at most a year.")
    return seconds


def _files_s(value: str | None) -> float | None:
    """The expiration in a lifecycle preference; None where it has none. Its access rules have no effect here."""
    if value is None:
        return None
    try:
        wish = json.loads(value)
        seconds = wish.get("expiration_duration_seconds")
    except (ValueError, AttributeError, RecursionError):
        raise BadRequest("X-Fal-Object-Lifecycle-Preference must be a JSON object.") from None
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
        raise BadRequest("expiration_duration_seconds must be a number of seconds, above 0.")
    return float(min(seconds, MAX_FILES_S))


def _webhook_url(value: str | None) -> str | None:
    if value is None:
        return None
    try:
        url = httpx.URL(value)
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host:
        raise BadRequest("fal_webhook must be an http or https URL.")
    return value
