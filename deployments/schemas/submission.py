"""What a submission asks for besides its input: fal's headers and query parameters. fal-queue-protocol.md, section 2.1.

Options without effect here, such as runner hints and fallbacks, are accepted, and their caller is told so.
"""

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, get_args

import httpx

from deployments.schemas.failures import shortened
from deployments.schemas.uploads import AccessRules, read_lifecycle
from engines.errors import BadRequest

PRIORITIES = {"normal": 0, "low": 1}
MAX_START_TIMEOUT_S = 365 * 86_400.0
MAX_KEY_CHARS = 255
MAX_RETRIES = 1000
MAX_IGNORED = 20

RetryCondition = Literal["server_error", "timeout", "connection_error"]
"""What an attempt can end in that fal tries again; `jobs/retry.py` says what is which here."""

RETRY_CONFIG = "x-fal-retry-config"
EFFECTIVE = frozenset(
    {
        "x-fal-queue-priority",
        "x-fal-request-timeout",
        "x-fal-no-retry",
        "x-fal-object-lifecycle-preference",
        "x-fal-store-io",
        "x-fal-target-url",  # the proxy protocol's
        "x-fal-client-proxy",
    }
)
"""Those of fal's headers that have an effect here, or ask for none. `RETRY_CONFIG` has one if it is valid."""


@dataclass(frozen=True)
class SubmissionOptions:
    """What the headers and the query of a submission ask for; `jobs.job.NewJob` says what each does.

    no_retry: at most one attempt. max_queue_length: how many requests may wait before this one; None: any number.
    ignored: fal's headers that have no effect here, and what has none in a retry config.
    """

    priority: int = 0
    start_timeout_s: float | None = None
    no_retry: bool = False
    retries: Mapping[RetryCondition, int] = field(default_factory=dict)
    webhook_url: str | None = None
    files_s: float | None = None
    files_access: AccessRules | None = None
    store_io: bool = True
    max_queue_length: int | None = None
    idempotency_key: str | None = None
    ignored: tuple[str, ...] = ()


def read_options(headers: Mapping[str, str], query: Mapping[str, str]) -> SubmissionOptions:
    """The options of a submission. headers: their names are in lower case. Raises `BadRequest`."""
    no_retry = is_set(headers.get("x-fal-no-retry", ""))
    retries, without_effect = _retries(headers.get(RETRY_CONFIG), no_retry)
    others = [name for name in headers if name.startswith(("x-fal-", "x-app-fal-")) and name not in {*EFFECTIVE, RETRY_CONFIG}]
    files = read_lifecycle(headers.get("x-fal-object-lifecycle-preference"))
    return SubmissionOptions(
        priority=_priority(headers.get("x-fal-queue-priority", "normal")),
        start_timeout_s=_start_timeout_s(headers.get("x-fal-request-timeout")),
        no_retry=no_retry,
        retries=retries,
        webhook_url=_webhook_url(query.get("fal_webhook") or None),  # forms send it empty
        files_s=files.keep_s,
        files_access=files.access,
        store_io=headers.get("x-fal-store-io", "1").lower() not in ("0", "false", "no"),
        max_queue_length=_max_queue_length(query.get("fal_max_queue_length")),
        idempotency_key=_idempotency_key(headers.get("idempotency-key")),
        ignored=tuple(sorted({*others, *without_effect}))[:MAX_IGNORED],
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


def _retries(value: str | None, no_retry: bool) -> tuple[dict[RetryCondition, int], list[str]]:
    """The retries that a config allows for each condition, and what in it has no effect. fal ignores what is not valid in it."""
    if value is None:
        return {}, []
    try:
        config = json.loads(value)
    except (ValueError, RecursionError):
        config = None
    if no_retry or not isinstance(config, dict):
        return {}, [RETRY_CONFIG]
    retries: dict[RetryCondition, int] = {}
    for condition in get_args(RetryCondition):
        wish = config.get(condition)
        count = wish.get("retries") if isinstance(wish, dict) else None
        if isinstance(count, int) and not isinstance(count, bool) and count >= 0:
            retries[condition] = min(count, MAX_RETRIES)
    return retries, [f"{RETRY_CONFIG}: {shortened(name)}" for name in config if name not in retries]


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
