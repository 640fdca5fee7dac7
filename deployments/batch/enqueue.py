"""Has a running service render the rows: as its jobs of low priority, a bounded number at a time, over its queue API.

A row is submitted under an idempotency key, so a run that was killed finds its jobs again instead of paying for them twice. A run
that is stopped cancels its jobs.
"""

import asyncio
import hashlib
import json
import logging
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Any

import httpx

from deployments.batch.contact_sheet import first_frame
from deployments.batch.records import Record, frame_of, video_of, write_record
from deployments.batch.run_folder import UPLOADED, Row, Run, RunFolder
from deployments.schemas.inputs import KEPT
from engines.errors import ReelrayError

logger = logging.getLogger(__name__)

POLL_S = (0.25, 2.0)
"""Between two looks at a job, in seconds: at first, and at most."""
PATIENCE_S = 600.0
"""For how long a service that does not answer is asked again, in seconds."""
BUSY = frozenset({429, 502, 503, 504})
"""Answers after which the same is asked again."""
PAUSE_S = 2.0
TIMEOUT_S = 60.0


class ServiceFailed(ReelrayError):
    """The service does not answer, or refuses the run."""


class Enqueue:
    """url: of the service. The environment's FAL_KEY is its API key, if it requires one."""

    def __init__(self, folder: RunFolder, run: Run, url: str):
        self.folder, self.run = folder, run
        key = os.environ.get("FAL_KEY")
        headers = {"x-fal-queue-priority": "low"} | ({"authorization": f"Key {key}"} if key else {})
        # its own machine's loopback is not behind a proxy
        direct = {f"all://{host}": None for host in ("localhost", "127.0.0.1", "[::1]")}
        self.http = httpx.AsyncClient(base_url=url, headers=headers, timeout=TIMEOUT_S, mounts=direct)
        self.files = httpx.AsyncClient(timeout=TIMEOUT_S, mounts=direct)  # another host may keep them, which gets no key
        self._uploads: dict[str, asyncio.Task[str]] = {}

    async def records(self, rows: Iterable[Row]) -> AsyncGenerator[Record, None]:
        """The rows' records as they end. Raises `ServiceFailed`; if it is closed before, the running jobs are cancelled."""
        waiting, ended = iter(rows), asyncio.Queue[asyncio.Task[Record]]()
        working: set[asyncio.Task[Record]] = set()
        try:
            while True:
                while len(working) < self.run.concurrency and (row := next(waiting, None)) is not None:
                    task = asyncio.create_task(self._render(row))
                    working.add(task)
                    task.add_done_callback(ended.put_nowait)
                if not working:
                    return
                task = await ended.get()
                working.discard(task)
                yield task.result()
        finally:
            for task in working:
                task.cancel()
            await asyncio.gather(*working, *self._uploads.values(), return_exceptions=True)
            await self.http.aclose()
            await self.files.aclose()

    async def _render(self, row: Row) -> Record:
        job_input = row.input | {name: await self._uploaded(value) for name, value in row.input.items() if _is_kept(value)}
        sent = hashlib.sha256(json.dumps(job_input, sort_keys=True).encode()).hexdigest()[:32]
        for attempt in range(1, 1000):
            submitted = await self._call(
                "POST",
                f"/queue/{self.run.endpoint}",
                json=job_input,
                headers={"idempotency-key": f"{self.run.digest[:32]}/{row.id}/{sent}/{attempt}"},
            )
            if "request_id" not in submitted:
                return await self._refused(row, submitted)
            path = f"/queue/{self.run.endpoint}/requests/{submitted['request_id']}"
            status = await self._completed(path)
            if status.get("error_type") != "client_cancelled":  # by an earlier driver of this run, when it was stopped
                return await self._ended(row, path, status)
        raise AssertionError

    async def _completed(self, path: str) -> dict[str, Any]:
        pause_s, longest_s = POLL_S
        try:
            while (status := await self._call("GET", f"{path}/status", params={"logs": 1}))["status"] != "COMPLETED":
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 1.5, longest_s)
        except asyncio.CancelledError:
            with suppress(httpx.HTTPError):
                await self.http.put(f"{path}/cancel", timeout=5.0)
            raise
        return status

    async def _ended(self, row: Row, path: str, status: dict[str, Any]) -> Record:
        result = await self._call("GET", path, busy=frozenset())  # a failed job's status is not the service's
        if "video" not in result:
            return await self._refused(row, result)
        mp4 = await self._download(result["video"]["url"])
        receipt = status.get("metrics", {}).get("receipt", {})
        warnings = tuple(line["message"] for line in status.get("logs") or () if line["level"] == "WARN")
        url = self.folder.url_of(video_of(row.id))
        record = Record(
            row.id, row.number, "done", url, result["seed"], None, receipt.get("seconds", {}), receipt, warnings=warnings
        )
        await asyncio.to_thread(self._publish, row, record, mp4)
        return record

    def _publish(self, row: Row, record: Record, mp4: bytes) -> None:
        if self.run.contact_sheet:
            self.folder.write(frame_of(row.id), first_frame(mp4))
        write_record(self.folder, row, record)
        self.folder.write(video_of(row.id), mp4)

    async def _refused(self, row: Row, answer: dict[str, Any]) -> Record:
        """The record of a row that the service has refused or failed."""
        detail = answer.get("detail")
        kind = detail[0].get("type") if isinstance(detail, list) and detail else answer.get("error_type")
        record = Record.of_failure(row, answer["http_status"], answer, kind)
        await asyncio.to_thread(write_record, self.folder, row, record)
        return record

    async def _uploaded(self, reference: str) -> str:
        """The URL that the service has for one of the run's files, which is sent to it once."""
        if reference not in self._uploads:
            self._uploads[reference] = asyncio.create_task(self._upload(reference.removeprefix(KEPT)))
        return await asyncio.shield(self._uploads[reference])

    async def _upload(self, name: str) -> str:
        """An earlier driver of the run may have sent it: a job is found again only if its input is the same."""
        noted = f"{UPLOADED}/{name.split('/')[1]}"
        if (earlier := await asyncio.to_thread(self.folder.read, noted)) is not None:
            answer = await self._patiently(lambda: self.files.head(earlier.decode()))
            if answer.is_success:
                return earlier.decode()
        data = await asyncio.to_thread(self.folder.read, name)
        if data is None:
            raise ServiceFailed(f"{self.folder.url_of(name)} is gone")
        kind = {"content_type": "application/octet-stream", "file_name": "data.bin"}
        place = await self._call("POST", "/rest/storage/upload/initiate", json=kind)
        if "upload_url" not in place:
            raise ServiceFailed(f"the service takes no files: {place.get('detail')}")
        headers = {"content-type": kind["content_type"]}
        sent = await self._patiently(lambda: self.files.put(place["upload_url"], content=data, headers=headers))
        if not sent.is_success:
            raise ServiceFailed(f"the service does not take {self.folder.url_of(name)}: {sent.text[:200]}")
        url: str = place["file_url"]
        await asyncio.to_thread(self.folder.write, noted, url.encode())
        return url

    async def _download(self, url: str) -> bytes:
        answer = await self._patiently(lambda: self.files.get(url))
        if not answer.is_success:
            raise ServiceFailed(f"{url} cannot be downloaded: HTTP {answer.status_code}")
        return answer.content

    async def _call(self, method: str, path: str, busy: frozenset[int] = BUSY, **options: Any) -> dict[str, Any]:
        """The JSON of an answer, with its status as `http_status`. Raises `ServiceFailed` where no row is at fault."""
        response = await self._patiently(lambda: self.http.request(method, path, **options), busy)
        if response.status_code in (401, 403):
            raise ServiceFailed(f"{self.http.base_url} refuses the key in FAL_KEY: {response.text[:200]}")
        is_json = response.headers.get("content-type", "").startswith("application/json")
        return {**(response.json() if is_json else {"detail": response.text[:200]}), "http_status": response.status_code}

    async def _patiently(self, call: Callable[[], Awaitable[httpx.Response]], busy: frozenset[int] = BUSY) -> httpx.Response:
        """The answer of a service that may be restarted or full meanwhile. Raises `ServiceFailed` after `PATIENCE_S`."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                response = await call()
                if response.status_code not in busy:
                    return response
                reason = f"HTTP {response.status_code}: {response.text[:200]}"
            except httpx.TransportError as exc:
                reason = f"{type(exc).__name__} {exc}"
            if time.monotonic() > deadline:
                raise ServiceFailed(f"{self.http.base_url} has not answered for {PATIENCE_S:.0f} s: {reason}")
            logger.warning("the service does not answer: %s", reason, extra={"action": "service_away"})
            await asyncio.sleep(PAUSE_S)


def _is_kept(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(KEPT)
