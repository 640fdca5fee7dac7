"""A caller of the queue API over plain HTTP, for the command line; applications use fal's own clients."""

import time
from collections.abc import Iterator
from typing import Any, Self

import httpx

from engines.errors import RequestError

POLL_INTERVAL_S = 0.25
NO_PROXY: dict[str, httpx.BaseTransport | None] = {f"all://{host}": None for host in ("localhost", "127.0.0.1", "[::1]")}
"""Hosts that are called directly. A proxy from the shell's environment is for others: this machine's loopback is not its own."""


class CallFailed(RequestError):
    """The service refused the call."""


class QueueClient:
    """A connection to `url`. key: an API key, if the service requires one."""

    def __init__(self, url: str, key: str | None = None):
        headers = {"authorization": f"Key {key}"} if key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=60.0, mounts=NO_PROXY)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def submit(self, endpoint: str, job_input: dict[str, Any]) -> str:
        """The new request's id."""
        request_id: str = self._call("POST", f"/queue/{endpoint}", json=job_input)["request_id"]
        return request_id

    def status(self, endpoint: str, request_id: str, *, logs: bool = False) -> dict[str, Any]:
        """Its status, with all its log lines so far if `logs`."""
        return self._call("GET", f"/queue/{endpoint}/requests/{request_id}/status", params={"logs": int(logs)})

    def follow(self, endpoint: str, request_id: str) -> Iterator[dict[str, Any]]:
        """Its status with logs, asked for several times a second until it is completed."""
        while True:
            status = self.status(endpoint, request_id, logs=True)
            yield status
            if status["status"] == "COMPLETED":
                return
            time.sleep(POLL_INTERVAL_S)

    def result(self, endpoint: str, request_id: str) -> dict[str, Any]:
        """Its output."""
        return self._call("GET", f"/queue/{endpoint}/requests/{request_id}")

    def cancel(self, endpoint: str, request_id: str) -> str:
        """The service's answer, e.g. CANCELLATION_REQUESTED."""
        answer: str = self._call("PUT", f"/queue/{endpoint}/requests/{request_id}/cancel")["status"]
        return answer

    def download(self, url: str) -> bytes:
        """A generated file. The API key is not sent: another host may keep the files."""
        try:
            with httpx.Client(timeout=60.0, mounts=NO_PROXY) as http:
                return http.get(url).raise_for_status().content
        except httpx.HTTPError as exc:
            raise CallFailed(f"{url} cannot be downloaded: {exc}") from exc

    def _call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        """The JSON of the answer. Raises `CallFailed` with the service's error message."""
        try:
            response = self._http.request(method, path, **options)
        except httpx.HTTPError as exc:
            raise CallFailed(f"{self._http.base_url} does not answer: {exc}") from exc
        body = response.json() if response.headers.get("content-type", "").startswith("application/json") else {}
        if response.is_success:
            return dict(body)
        raise CallFailed(_message_of(body) or f"HTTP {response.status_code}")


def _message_of(body: Any) -> str:
    """The message of an error answer, which has either of fal's two shapes."""
    detail = body.get("detail", body.get("status", "")) if isinstance(body, dict) else ""
    if isinstance(detail, list):
        return "\n".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in detail)
    return str(detail)
