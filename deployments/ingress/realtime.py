"""/run/<endpoint>/realtime: many requests on one WebSocket, as both of fal's clients speak it. fal-queue-protocol.md, section 3.

A request is a msgpack map in a binary frame, or JSON in a text frame; its output comes back in the same encoding, with its
`request_id` if it has one. Requests are answered one after the other. While one is worked on, the newest others wait: so many as
`max_buffering` says, by default one. Older ones are dropped without an answer, so a caller who draws gets his latest picture.

Each request is a job of the queue, without retries. Errors are messages, and the connection stays open. When the caller hangs up,
the job in hand is cancelled. Outputs are sent one by one, so a caller who reads slowly slows down only himself.
"""

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Collection
from contextlib import ExitStack, closing
from typing import Any

import msgpack
from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from pydantic_core import from_json, to_json

from deployments.ingress.access import Caller, caller_of, is_still_valid
from deployments.ingress.body import Bodies, SplitBody, split, take_out
from deployments.ingress.middleware import failure_response
from deployments.ingress.request_context import bodies_of, quotas_of, store_of
from deployments.ingress.routes.run_routes import accept_or_give_up, end_of, give_up, output_of
from deployments.jobs.database import StoreAway
from deployments.jobs.keys import Scope
from deployments.schemas import responses
from deployments.schemas.endpoint import ENDPOINTS, Endpoint
from deployments.schemas.failures import Failure, error_failure, request_failure
from deployments.schemas.submission import SubmissionOptions
from engines.errors import BadRequest, RequestError, TooManyRequests, Unauthorized

logger = logging.getLogger(__name__)

IDLE_S = 60.0
"""After so long without a request the connection is closed, as at fal. The JavaScript client opens another with its next one."""
MAX_BUFFERING = 60
MAX_WAITING_BYTES = 1 << 24
"""Of all the requests that wait on one connection. uvicorn refuses a larger message."""
MAX_ITEMS = 1000
"""Of a request in msgpack, with what is nested in it: inputs have some twenty fields."""
UNAUTHORIZED = {"status": "error", "error": "Unauthorized"}
"""On this the JavaScript client drops its token and gets a new one."""
NORMAL, POLICY_VIOLATION, INTERNAL_ERROR = 1000, 1008, 1011


def add_realtime_routes(app: FastAPI, models: Collection[str]) -> None:
    """A route for each endpoint that is fast enough for it, if its model is among `models`."""
    for endpoint in ENDPOINTS.values():
        if endpoint.realtime and endpoint.model in models:
            _add(app, endpoint)


def _add(app: FastAPI, endpoint: Endpoint) -> None:
    async def route(websocket: WebSocket) -> None:
        await _answer(websocket, endpoint)

    app.add_api_websocket_route(f"/run/{endpoint.id}/realtime", route)


async def _answer(websocket: WebSocket, endpoint: Endpoint) -> None:
    with ExitStack() as stack:
        try:
            caller = await caller_of(websocket, endpoint.id)
            caller.require(Scope.SUBMIT)
            most = _max_buffering(websocket.query_params.get("max_buffering", "1"))
            stack.enter_context(quotas_of(websocket).stream(caller.owner))
        except (RequestError, StoreAway) as exc:
            await _refuse(websocket, exc)
            return
        waiting = stack.enter_context(closing(_Waiting(most, bodies_of(websocket))))
        await websocket.accept()
        session = _Session(websocket, endpoint, caller)
        reading = asyncio.create_task(session.read(waiting))
        working = asyncio.create_task(session.work(waiting))
        try:
            await asyncio.wait([reading, working], return_when=asyncio.FIRST_COMPLETED)
        finally:
            reading.cancel()
            working.cancel()
            await asyncio.gather(reading, working, return_exceptions=True)


async def _refuse(websocket: WebSocket, exc: RequestError | StoreAway) -> None:
    """Answers the handshake; to a caller with a token, which may only be too old, as fal does it."""
    if isinstance(exc, Unauthorized) and "fal_jwt_token" in websocket.query_params:
        await websocket.accept()
        await websocket.send_text(json.dumps(UNAUTHORIZED))
        await websocket.close(POLICY_VIOLATION, exc.message)
    else:
        await websocket.send_denial_response(failure_response(_failure_of(exc)))


def _max_buffering(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 4 and 1 <= int(text) <= MAX_BUFFERING):
        raise BadRequest(f"max_buffering must be a whole number from 1 to {MAX_BUFFERING}.")
    return int(text)


def _failure_of(exc: RequestError | StoreAway) -> Failure:
    if isinstance(exc, StoreAway):
        return request_failure(503, "internal_error", "The service is temporarily unavailable.")
    return error_failure(exc)


class _Waiting:
    """The newest requests that wait, `most` at most, and the one in hand. They have room among the bodies of this process."""

    def __init__(self, most: int, bodies: Bodies):
        self._most, self._bodies = most, bodies
        self._frames = deque[tuple[bytes | str, Callable[[], None]]]()
        self._arrived = asyncio.Event()
        self._done: Callable[[], None] = lambda: None

    def add(self, frame: bytes | str) -> None:
        """Raises `TooManyRequests`."""
        while self._frames and (len(self._frames) == self._most or self._size + len(frame) > MAX_WAITING_BYTES):
            self._frames.popleft()[1]()
        self._frames.append((frame, self._bodies.hold(len(frame))))
        self._arrived.set()

    async def next(self) -> bytes | str:
        """The oldest, once the one before it is done. Raises `TimeoutError` if none comes."""
        self._finish()
        async with asyncio.timeout(IDLE_S):
            while not self._frames:
                self._arrived.clear()
                await self._arrived.wait()
        frame, self._done = self._frames.popleft()
        return frame

    def close(self) -> None:
        """Gives all room back."""
        self._finish()
        while self._frames:
            self._frames.popleft()[1]()

    def _finish(self) -> None:
        self._done()
        self._done = lambda: None

    @property
    def _size(self) -> int:
        return sum(len(frame) for frame, _ in self._frames)


class _Session:
    """The answering side of one connection."""

    def __init__(self, websocket: WebSocket, endpoint: Endpoint, caller: Caller):
        self._websocket, self._endpoint, self._caller = websocket, endpoint, caller

    async def read(self, waiting: _Waiting) -> None:
        """Takes requests until the caller hangs up."""
        while (message := await self._websocket.receive())["type"] != "websocket.disconnect":
            text: str | None = message.get("text")
            try:
                waiting.add(message.get("bytes") or b"" if text is None else text)
            except TooManyRequests as exc:
                await self._send_failure(_failure_of(exc), {})

    async def work(self, waiting: _Waiting) -> None:
        """Answers requests until none comes any more."""
        try:
            frame = await waiting.next()
            while await self._may_go_on():
                await self._serve(frame)
                frame = await waiting.next()
            await self._websocket.send_text(json.dumps(UNAUTHORIZED))
            await self._websocket.close(POLICY_VIOLATION, "The API key has ended.")
        except TimeoutError:
            await self._send_control("x-fal-error", error="TIMEOUT", reason=f"No request came for {IDLE_S:g} s.")
            await self._websocket.close(NORMAL)
        except WebSocketDisconnect:
            pass
        except Exception:
            logger.exception("a realtime connection failed", extra={"action": "realtime_failed"})
            await self._send_control("x-fal-error", error="INTERNAL_ERROR", reason="The service failed.")
            await self._websocket.close(INTERNAL_ERROR)

    async def _may_go_on(self) -> bool:
        try:
            return await is_still_valid(self._websocket, self._caller)
        except StoreAway:  # which the request is told next
            return True

    async def _serve(self, frame: bytes | str) -> None:
        began = time.monotonic()
        echo: dict[str, Any] = {}
        try:
            given, uris = await _decoded(frame)
            if isinstance(request_id := given.pop("request_id", None), str | int):
                echo["request_id"] = request_id
            answer = await self._render(_body(given, uris))
        except (RequestError, StoreAway) as exc:
            answer = _failure_of(exc)
        if isinstance(answer, Failure):
            await self._send_failure(answer, echo)
            return
        output = answer | echo
        if isinstance(frame, str):
            await self._websocket.send_text(json.dumps(output))
        else:
            await self._websocket.send_bytes(msgpack.packb(output))
        await self._send_control("x-fal-message", action="timings", timing=round(time.monotonic() - began, 6))

    async def _render(self, body: SplitBody) -> dict[str, Any] | Failure:
        """A request's output, as a job of the queue."""
        options = SubmissionOptions(no_retry=True)
        accepted = await accept_or_give_up(self._websocket, self._endpoint, self._caller, options, body)
        if isinstance(accepted, Failure):
            return accepted
        store = store_of(self._websocket)
        try:
            job = await end_of(store, accepted.job.id)
        except BaseException:
            await give_up(store, accepted.job.id)
            raise
        return responses.failure_of(job) or output_of(self._websocket, job)

    async def _send_failure(self, failure: Failure, echo: dict[str, Any]) -> None:
        detail = {"status": failure.status, "detail": failure.body["detail"], **echo}
        await self._send_control("x-fal-error", error=failure.error_type, reason=failure.error, **detail)

    async def _send_control(self, kind: str, **fields: Any) -> None:
        await self._websocket.send_text(json.dumps({"type": kind, **fields}))


async def _decoded(frame: bytes | str) -> tuple[dict[str, Any], dict[str, memoryview]]:
    """The fields of a request, with a name in place of each large data URI, and these. Raises `BadRequest`, `BodyTooLarge`."""
    given: object = None
    uris = dict[str, memoryview]()
    try:
        if isinstance(frame, str):
            body = await split(bytearray(frame.encode()))
            given, uris = from_json(body.fields), body.uris
        else:
            given = _unpacked(frame)
    except (ValueError, RecursionError, msgpack.UnpackException):
        pass
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
        raise BadRequest("The message must be a map in msgpack, or an object in JSON text.")
    return given, take_out(given, len(frame)) if isinstance(frame, bytes) else uris


def _body(given: dict[str, Any], uris: dict[str, memoryview]) -> SplitBody:
    try:
        return SplitBody(to_json(given), uris)
    except (ValueError, RecursionError):  # bytes that are no text, extension types
        raise BadRequest("The message must be a map of text, numbers, booleans and null.") from None


def _unpacked(frame: bytes) -> object:
    """Raises `ValueError` for more than `MAX_ITEMS` items in all: 16 MB of nested lists would stop the event loop for 0.8 s."""
    left = MAX_ITEMS

    def counted(items: Any) -> Any:
        nonlocal left
        if (left := left - len(items)) < 0:
            raise ValueError("too many items")
        return items

    options = {"max_array_len": MAX_ITEMS, "max_map_len": MAX_ITEMS, "list_hook": counted, "object_hook": counted}
    return msgpack.unpackb(frame, strict_map_key=True, **options)
