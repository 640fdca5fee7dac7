"""GET .../status/stream: a request's status as server-sent events, until it is completed."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager
from typing import Any
from uuid import UUID

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from starlette import types

from deployments.ingress.access import job_of
from deployments.ingress.request_context import TextRoute, quotas_of, settings_of, store_of
from deployments.ingress.target_routing import queue_base
from deployments.jobs.keys import Scope
from deployments.jobs.queue_position import STEP
from deployments.jobs.store import JobStore
from deployments.schemas import responses
from deployments.schemas.submission import is_set

logger = logging.getLogger(__name__)

STREAM_POSITION_S = 3.0
"""In seconds. How often a stream near the front of the queue, where positions are exact, looks whether its request has moved up:
that does not wake it."""

STREAM_LOOK_S = 30.0
"""In seconds. How often it looks for a change that it was not told of. With 10,000 streams open that is 300 reads a second."""

STREAM_COMMENT_S = 10.0
"""In seconds. After this long without an event it sends a comment, to keep the connection open."""

STREAM_PAUSE_S = 0.2
"""In seconds. Log lines that follow an event this soon are sent together in the next one; a change of state is sent at once."""

COMMENT = ": still here\n\n"

router = APIRouter(prefix="/queue", route_class=TextRoute, include_in_schema=False)  # `schemas/openapi.py` describes it


@router.get("/{app:path}/requests/{request_id}/status/stream")
async def status_stream(request: Request, app: str, request_id: str, logs: str = "0") -> Response:
    """The status as server-sent events: one whenever it changes, each with the log lines that are new, until completed.

    With logs, an event's id is the `seq` of its last line. If a request has a `Last-Event-ID`, as browsers send it when they
    reconnect, the stream goes on after that line.
    """
    job = await job_of(request, app, request_id, Scope.READ)
    queue_url = queue_base(request.scope, settings_of(request).public_url)
    events = _status_events(store_of(request), job.id, is_set(logs), queue_url, responses.last_event_id(request.headers))
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return _Counted(quotas_of(request).stream(job.owner), events, media_type="text/event-stream", headers=headers)


class _Counted(StreamingResponse):
    """An answer within a context, which ends however the answer ends. An error on entering it is the answer."""

    def __init__(self, context: AbstractContextManager[None], *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._context = context

    async def __call__(self, scope: types.Scope, receive: types.Receive, send: types.Send) -> None:
        """Sends the answer."""
        with self._context:
            await super().__call__(scope, receive, send)


async def _status_events(store: JobStore, job_id: UUID, with_logs: bool, queue_url: str, last_seq: int) -> AsyncIterator[str]:
    last_sent: dict[str, Any] | None = None
    while True:
        try:
            # watch before the first read, so that no change is missed
            async with store.watch(job_id) as changes, store.watch_lines(job_id) as lines_too:
                while True:
                    job = await store.get(job_id, last_seq if with_logs else None)
                    if job is None:
                        return
                    lines = job.lines if with_logs else None
                    sent = responses.status(job, None, queue_url)
                    if lines or sent != last_sent:
                        last_sent, last_seq = sent, lines[-1].seq if lines else last_seq
                        event_id = f"id: {last_seq}\n" if last_seq else ""
                        yield f"{event_id}data: {json.dumps(responses.status(job, lines, queue_url))}\n\n"
                    if job.state.ended:
                        return
                    if await changes.changed(STREAM_PAUSE_S):
                        continue
                    is_near = job.position is not None and job.position < STEP
                    look_at = time.monotonic() + (STREAM_POSITION_S if is_near else STREAM_LOOK_S)
                    woken_by = lines_too if with_logs else changes
                    while (left_s := look_at - time.monotonic()) > 0 and not await woken_by.changed(
                        min(left_s, STREAM_COMMENT_S)
                    ):
                        yield COMMENT
        except Exception:
            # The JavaScript client takes the last status that it received for the final one: a stream must outlast its job.
            logger.warning("status stream interrupted", exc_info=True, extra={"action": "stream_outage"})
            yield COMMENT
            await asyncio.sleep(1.0)
