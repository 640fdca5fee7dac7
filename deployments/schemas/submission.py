"""What a submission asks for besides its input: fal's headers and query parameters. fal-queue-protocol.md, section 2.1.

Options without effect here are accepted: runner hints, retry configs, fallbacks.
"""

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import httpx

from deployments.schemas.uploads import AccessRules, read_lifecycle
from engines.errors import BadRequest

PRIORITIES = {"normal": 0, "low": 1}
MAX_START_TIMEOUT_S = 365 * 86_400.0
MAX_KEY_CHARS = 255


@dataclass(frozen=True)
class SubmissionOptions:
    """What the headers and the query of a submission ask for; `jobs.job.NewJob` says what each does.

    no_retry: at most one attempt. max_queue_length: how many requests may wait before this one; None: any number.
    """

    priority: int = 0
    start_timeout_s: float | None = None
    no_retry: bool = False
    webhook_url: str | None = None
    files_s: float | None = None
    files_access: AccessRules | None = None
    store_io: bool = True
    max_queue_length: int | None = None
    idempotency_key: str | None = None


def read_options(headers: Mapping[str, str], query: Mapping[str, str]) -> SubmissionOptions:
    """The options of a submission. headers: looked up in lower case. Raises `BadRequest`."""
    files = read_lifecycle(headers.get("x-fal-object-lifecycle-preference"))
    return SubmissionOptions(
        priority=_priority(headers.get("x-fal-queue-priority", "normal")),
        start_timeout_s=_start_timeout_s(headers.get("x-fal-request-timeout")),
        no_retry=is_set(headers.get("x-fal-no-retry", "")),
        webhook_url=_webhook_url(query.get("fal_webhook") or None),  # forms send it empty
        files_s=files.keep_s,
        files_access=files.access,
        store_io=headers.get("x-fal-store-io", "1").lower() not in ("0", "false", "no"),
        max_queue_length=_max_queue_length(query.get("fal_max_queue_length")),
        idempotency_key=_idempotency_key(headers.get("idempotency-key")),
    )


def fingerprint(endpoint: str, body: bytes) -> bytes:
    """A hash that is the same for equal JSON: when a caller repeats a request, its fields may come in another order."""
    with suppress(ValueError, RecursionError):  # a body that is not JSON is hashed as it is
        body = json.dumps(json.loads(body or b"{}"), sort_keys=True).encode()
    return hashlib.sha256(endpoint.encode() + b"\0" + body).digest()


def is_set(flag: str) -> bool:
    """A flag as either client writes it: 1 or 0, true or false."""
    return flag.lower() in ("1", "true", "yes")


def _idempotency_key(key: str | None) -> str | None:
    if key is not None and (
        not 1 <= len(key) <= MAX_KEY_CHARS or any(unicodedata.category(character) == "Cc" for character in key)
    ):
        raise BadRequest(f"Idempotency-Key must be 1 to {MAX_KEY_CHARS} characters, none of them a control character.")
    return key


def _max_queue_length(value: str | None) -> int | None:
    if value is None:
        return None
    if not (value.isascii() and value.isdecimal() and len(value) < 10):
        raise BadRequest("fal_max_queue_length must be a whole number, 0 or more.")
    return int(value)


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
    if not 0 < seconds <= MAX_START_TIMEOUT_S:  # false for NaN as well
        raise BadRequest("X-Fal-Request-Timeout must be a number of seconds, above 0 and at most a year.")
    return seconds


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
