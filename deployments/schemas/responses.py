"""A job in fal's words: what submit, status and result say about it. fal-queue-protocol.md, sections 2.1, 2.2 and 2.4."""

import re
from collections.abc import Iterable, Mapping
from datetime import UTC
from typing import Any

from deployments.jobs.job import Failure, Job, JobState, LogLine
from deployments.schemas import error_failure
from deployments.storage import URL_PREFIX
from engines.errors import Cancelled

NAMESPACES = ("workflows", "comfy")
STATUS = {JobState.QUEUED: "IN_QUEUE", JobState.RUNNING: "IN_PROGRESS"}
"""For a job that has not ended; every end is COMPLETED. Both clients poll for ever, or raise, on a fourth word."""


def app_id(endpoint: str) -> str:
    """Owner and alias of an endpoint's id, which is all that the clients keep of it once a request is submitted."""
    segments = endpoint.split("/")
    return "/".join(segments[: 3 if segments[0] in NAMESPACES else 2])


def submitted(job: Job, queue_url: str) -> dict[str, Any]:
    """The answer to a submission. The Python client follows its URLs and fails without any one of them."""
    return {
        "status": "IN_QUEUE",
        "request_id": str(job.id),
        "gateway_request_id": str(job.id),
        "queue_position": job.position or 0,
        "logs": None,
        "metrics": {},
        **_links(job, queue_url),
    }


def status(job: Job, lines: Iterable[LogLine] | None, queue_url: str) -> dict[str, Any]:
    """The status. lines: None where logs were not asked for; callers map over the list, so it is one even when empty."""
    body: dict[str, Any] = {
        "status": STATUS.get(job.state, "COMPLETED"),
        "request_id": str(job.id),
        **_links(job, queue_url),
        "logs": None if lines is None else [_log_item(line) for line in lines],
        "metrics": job.metrics if job.state.ended else {},
    }
    if job.state is JobState.QUEUED:
        body["queue_position"] = job.position or 0
    if failure := failure_of(job):
        body |= {"error": failure.error, "error_type": failure.error_type}
    return body


def last_event_id(headers: Mapping[str, str]) -> int:
    """The last event that a status stream's caller has seen before; 0: none, or none of ours."""
    seen = headers.get("last-event-id", "")
    return int(seen) if re.fullmatch("[0-9]{1,9}", seen) else 0


def failure_of(job: Job) -> Failure | None:
    """What the result request answers instead of a result; None if the job did not end without one."""
    if job.state is JobState.CANCELLED:
        return job.failure or error_failure(Cancelled())
    return job.failure if job.state is JobState.FAILED else None


def with_absolute_urls(value: Any, service_url: str) -> Any:
    """A stored result with the service's address put before the URLs of its files.

    Added when it is read: the address that this caller knows need not be the one that another caller submitted to.
    """
    if isinstance(value, list):
        return [with_absolute_urls(item, service_url) for item in value]
    if not isinstance(value, dict):
        return value
    full = {key: with_absolute_urls(item, service_url) for key, item in value.items()}
    url = full.get("url")
    return {**full, "url": service_url + url} if isinstance(url, str) and url.startswith(URL_PREFIX) else full


def _links(job: Job, queue_url: str) -> dict[str, str]:
    url = f"{queue_url}/{app_id(job.endpoint)}/requests/{job.id}"
    return {"response_url": url, "status_url": f"{url}/status", "cancel_url": f"{url}/cancel"}


def _log_item(line: LogLine) -> dict[str, Any]:
    """fal's four keys and two of ours: the line's number within the request, and its progress for programs, if it has any."""
    timestamp = line.at.astimezone(UTC).isoformat()
    item = {"message": line.message, "level": line.level, "source": "USER", "timestamp": timestamp, "seq": line.seq}
    return item if line.progress is None else item | {"progress": line.progress}
