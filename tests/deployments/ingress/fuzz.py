"""Requests that Schemathesis makes up from our OpenAPI documents, against the app on a real database.

`python -m pytest tests/deployments/ingress/test_schema.py` tries a few of each operation, the same ones every time; with
`FUZZ_EXAMPLES` set (`make fuzz`) it tries so many, other ones every time.
"""

import asyncio
import os
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import requests
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from deployments.files.file_store import FileStore
from deployments.ingress.app import create_app
from deployments.jobs.job import NewJob
from deployments.jobs.store import JobStore
from deployments.schemas.endpoint import ENDPOINTS
from deployments.schemas.failures import error_failure
from deployments.settings import Settings
from engines.errors import ImageLoadError
from tests.patience import PATIENCE_S

BASE_URL = "http://localhost"
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
VIDEO = {"url": "/files/x/video.mp4", "content_type": "video/mp4", "file_name": "video.mp4", "file_size": 10}
T = TypeVar("T")


class Fuzzed:
    """The app in a thread with an event loop of its own, since Schemathesis is not asynchronous. ids: of each endpoint's jobs."""

    def __init__(self, database: str, home: Path):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.run(self._open(database, Settings(home=home)))

    async def _open(self, database: str, settings: Settings) -> None:
        self.store = await JobStore.open(database)
        app = create_app(settings, self.store)
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=BASE_URL)
        self.ids = {endpoint: await jobs_in_every_state(self.store, endpoint) for endpoint in ENDPOINTS}
        self._finishing = asyncio.create_task(self._finish_jobs())
        file = await FileStore(settings.files_url).put("video.mp4", b"0123456789", "video/mp4")
        self.file = file.path.removeprefix("/files/")

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)

    async def _finish_jobs(self) -> None:
        """Ends every job at once: a direct call waits for its end."""
        async with self.store.claims.watch_work() as work:
            while True:
                if claim := await self.store.claims.take(list(ENDPOINTS), 600, 600):
                    await self.store.claims.succeed(claim, {"video": VIDEO, "seed": 1}, {"inference_time": 1.5})
                else:
                    await work.changed(1)

    async def _close(self) -> None:
        self._finishing.cancel()
        await asyncio.gather(self._finishing, return_exceptions=True)
        await self.client.aclose()
        await self.store.close()

    def close(self) -> None:
        self.run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def send(self, case: Any) -> httpx.Response:
        request = requests.Request(**case.as_transport_kwargs(base_url=BASE_URL)).prepare()
        headers = {name: value for name, value in request.headers.items() if isinstance(value, str)}
        body: Any = request.body
        return self.run(self.client.request(request.method or "", request.url or "", headers=headers, content=body))


async def jobs_in_every_state(store: JobStore, endpoint: str) -> list[str]:
    """Their ids, of which the first three have ended."""
    new = NewJob(endpoint, {"prompt": "a", "seed": 1}, webhook_url="http://127.0.0.1:1/hook")
    done = await store.submit(new)
    if claim := await store.claims.take([endpoint], 600, 600):
        await store.claims.succeed(claim, {"video": VIDEO, "seed": 1}, {"inference_time": 1.5})
    failed = await store.submit(new)
    if claim := await store.claims.take([endpoint], 600, 600):
        await store.claims.fail(claim, error_failure(ImageLoadError("It is damaged.", ("body", "image_url"))), {})
    cancelled, running, waiting = [await store.submit(new) for _ in range(3)]
    await store.request_cancel(cancelled.id)
    await store.claims.take([endpoint], 600, 600)
    return [str(job.id) for job in (done, failed, cancelled, running, waiting)]


@contextmanager
def fuzzed(database: str, home: Path) -> Iterator[Fuzzed]:
    made = Fuzzed(database, home)
    try:
        yield made
    finally:
        made.close()


def try_all(target: Fuzzed, document: dict[str, Any], examples: int) -> dict[str, set[int]]:
    """Tries every operation of a document. Returns operation -> the status codes it answered. Raises what Schemathesis finds."""
    import schemathesis  # slow to import, and every worker imports this file
    from schemathesis.core.result import Ok

    schema = schemathesis.openapi.from_dict(document)
    seen: dict[str, set[int]] = {}
    for result in schema.get_all_operations():
        assert isinstance(result, Ok), result
        operation = result.ok()
        codes = seen.setdefault(operation.label, set())
        try_one(target, operation, EXAMPLES or examples, codes)
    return seen


def checks() -> list[Any]:
    """What an answer must keep to."""
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    return [
        not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_headers_conformance,
        checks.response_schema_conformance,
    ]


def try_one(target: Fuzzed, operation: Any, examples: int, codes: set[int]) -> None:
    import schemathesis

    wanted = checks()
    first, *_ = ENDPOINTS
    ids = target.ids[next((endpoint for endpoint in ENDPOINTS if f"/{endpoint}/" in operation.path), first)]
    ids = ids[:3] if operation.path.endswith("/stream") else ids  # a stream ends with its job
    known = {"request_id": st.sampled_from([*ids, None]), "name": st.just(target.file)}

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=not EXAMPLES,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(
        case=operation.as_strategy() | operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE),
        drawn=st.fixed_dictionaries(known),
        endpoint=st.none() | st.sampled_from(list(ENDPOINTS)),
    )
    def attempt(case: Any, drawn: dict[str, str | None], endpoint: str | None) -> None:
        if endpoint is not None and "endpoint_id" in (case.query or {}):
            case.query["endpoint_id"] = endpoint
        for name, value in drawn.items():
            if value is not None and name in (case.path_parameters or {}):
                case.path_parameters[name] = value
        response = target.send(case)
        codes.add(response.status_code)
        case.validate_response(response, checks=wanted)

    attempt()
