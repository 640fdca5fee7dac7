"""The answers to submit, status and result, as fal words them. fal-queue-protocol.md, sections 2.1, 2.2 and 2.4."""

import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Protocol
from uuid import UUID

from pydantic import BaseModel

from deployments.schemas.failures import Failure, error_failure
from engines.errors import Cancelled

NAMESPACES = ("workflows", "comfy")
STATUS = {"queued": "IN_QUEUE", "running": "IN_PROGRESS"}
"""For a job that has not ended; every end is COMPLETED. On any other word both of fal's clients poll for ever, or raise."""

URL_PREFIX = "/files/"
"""The start of every stored file's URL. In an answer to a caller, the service's address is put before it."""


class LoggedLine(Protocol):
    """What a response shows of a log line; see `jobs.job.LogLine`."""

    @property
    def seq(self) -> int: ...  # noqa: D102
    @property
    def at(self) -> datetime: ...  # noqa: D102
    @property
    def level(self) -> str: ...  # noqa: D102
    @property
    def message(self) -> str: ...  # noqa: D102
    @property
    def progress(self) -> dict[str, Any] | None: ...  # noqa: D102


class JobView(Protocol):
    """What a response shows of a job; see `jobs.job.Job`. A protocol, as `jobs` imports the schemas and not the reverse."""

    @property
    def id(self) -> UUID: ...  # noqa: D102
    @property
    def endpoint(self) -> str: ...  # noqa: D102
    @property
    def state(self) -> str: ...  # noqa: D102
    @property
    def position(self) -> int | None: ...  # noqa: D102
    @property
    def failure(self) -> Failure | None: ...  # noqa: D102
    @property
    def metrics(self) -> dict[str, Any]: ...  # noqa: D102


def app_id(endpoint: str) -> str:
    """Owner and alias of an endpoint's id. Once a request is submitted, the clients use only these."""
    segments = endpoint.split("/")
    return "/".join(segments[: 3 if segments[0] in NAMESPACES else 2])


def submitted(job: JobView, queue_url: str) -> dict[str, Any]:
    """The answer to a submission. The Python client follows its URLs, and fails if one of them is missing."""
    return {
        "status": "IN_QUEUE",
        "request_id": str(job.id),
        "gateway_request_id": str(job.id),
        "queue_position": job.position or 0,
        "logs": None,
        "metrics": {},
        **_links(job, queue_url),
    }


def status(job: JobView, lines: Iterable[LoggedLine] | None, queue_url: str) -> dict[str, Any]:
    """The status. lines: None if logs were not asked for; else a list, even if empty: callers map over it."""
    body: dict[str, Any] = {
        "status": STATUS.get(job.state, "COMPLETED"),
        "request_id": str(job.id),
        **_links(job, queue_url),
        "logs": None if lines is None else [_log_item(line) for line in lines],
        "metrics": {} if job.state in STATUS else {"inference_time": None} | job.metrics,
    }
    if job.state == "queued":
        body["queue_position"] = job.position or 0
    if failure := failure_of(job):
        body |= {"error": failure.error, "error_type": failure.error_type}
    return body


def partial(job_input: BaseModel, output: type[BaseModel], line: LoggedLine | None) -> dict[str, Any]:
    """An event of a stream before its last one, which is the output itself: the output's fields, with what is known already.

    `partial`, `progress` and `log` are in these events only. line: null for the first event.
    """
    known = {name: getattr(job_input, name, None) for name in output.model_fields}
    shown = None if line is None else _log_item(line)
    return {**known, "partial": True, "progress": shown and shown.get("progress"), "log": shown}


def last_event_id(headers: Mapping[str, str]) -> int:
    """The last event that the caller of a status stream has seen before; 0 if there is none, or it is not one of ours."""
    seen = headers.get("last-event-id", "")
    return int(seen) if re.fullmatch("[0-9]{1,9}", seen) else 0


def failure_of(job: JobView) -> Failure | None:
    """What the result request answers for a job that ended without a result; None for all other jobs."""
    if job.state == "cancelled":
        return job.failure or error_failure(Cancelled())
    return job.failure if job.state == "failed" else None


def with_absolute_urls(value: Any, service_url: str) -> Any:
    """A stored result with the service's address put before the URLs of its files.

    It is added on reading, because the address that this caller uses may differ from the one that was submitted to.
    """
    if isinstance(value, list):
        return [with_absolute_urls(item, service_url) for item in value]
    if not isinstance(value, dict):
        return value
    full = {key: with_absolute_urls(item, service_url) for key, item in value.items()}
    url = full.get("url")
    return {**full, "url": service_url + url} if isinstance(url, str) and url.startswith(URL_PREFIX) else full


def _links(job: JobView, queue_url: str) -> dict[str, str]:
    url = f"{queue_url}/{app_id(job.endpoint)}/requests/{job.id}"
    return {"response_url": url, "status_url": f"{url}/status", "cancel_url": f"{url}/cancel"}


def _log_item(line: LoggedLine) -> dict[str, Any]:
    """fal's four keys, and `labels`, where older clients look for two of them; and two keys of ours: the line's number within the
    request, and its progress for programs, if it has any."""
    labels = {"level": line.level, "source": "USER"}
    timestamp = line.at.astimezone(UTC).isoformat()
    item = {"message": line.message, **labels, "labels": labels, "timestamp": timestamp, "seq": line.seq}
    return item if line.progress is None else item | {"progress": line.progress}
