"""The service for wire tests: the real app under uvicorn on a loopback port, and a stand-in for the GPUs behind the store."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.dispatch.dispatcher import Dispatcher
from deployments.files.file_store import FileStore
from deployments.hosting.gateway import KEEP_ALIVE_S
from deployments.hosting.tls import TlsFiles
from deployments.jobs.database import StoreAway
from deployments.jobs.job import Claim, LeaseLost
from deployments.jobs.store import JobStore
from deployments.schemas.endpoint import ENDPOINTS
from deployments.schemas.failures import error_failure
from deployments.settings import QueueSettings, RetentionSettings
from deployments.stages.progress import StageProgress
from engines import errors
from engines.errors import ModelError, ReelrayError
from engines.spec import Progress

ENDPOINT = "fal-ai/animatediff-sparsectrl-lcm"
VIDEO = b"\0\0\0\x18ftypmp42" + bytes(range(256)) * 8
LEASE_S = 30.0


class Wire:
    """Records requests as they arrive and answers as they are sent; proxied requests under their target URLs."""

    def __init__(self, app: ASGIApp):
        self.app = app
        self.requests: list[tuple[str, str]] = []
        self.answered: list[tuple[str, str]] = []
        self._changed = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers: dict[str, str] = {key.decode(): value.decode() for key, value in scope["headers"]}
            request: tuple[str, str] = (scope["method"], headers.get("x-fal-target-url") or scope["path"])
            self.requests.append(request)
            self._changed.set()

        async def watched_send(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.body":
                self.answered.append(request)
                self._changed.set()

        await self.app(scope, receive, watched_send if scope["type"] == "http" else send)

    def count(self, method: str, ending: str) -> int:
        return _count(self.requests, method, ending)

    async def arrival(self, method: str, ending: str) -> None:
        """Returns once `count` is above 0."""
        while not self.count(method, ending):
            self._changed.clear()
            await self._changed.wait()

    async def answer(self, method: str, ending: str) -> None:
        """Returns once the first piece of an answer has been sent."""
        while not _count(self.answered, method, ending):
            self._changed.clear()
            await self._changed.wait()


def _count(requests: list[tuple[str, str]], method: str, ending: str) -> int:
    return sum(1 for seen, url in requests if seen == method and url.partition("?")[0].endswith(ending))


@asynccontextmanager
async def listening(app: ASGIApp, tls: TlsFiles | None = None) -> AsyncIterator[str]:
    """Serves `app`, by https if `tls` is given; yields its base URL."""
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=0,
        log_level="critical",  # a stream that is cut off on purpose is an error to uvicorn
        lifespan="on",
        timeout_keep_alive=KEEP_ALIVE_S,  # as long as our own hostings
        timeout_graceful_shutdown=1,
        ssl_certfile=tls.chain if tls else None,
        ssl_keyfile=tls.key if tls else None,
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    try:
        while not server.started:
            assert not serving.done(), "uvicorn did not start"
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"{'https' if tls else 'http'}://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await serving


@asynccontextmanager
async def working(store: JobStore, files: FileStore, step_s: float = 0.05) -> AsyncIterator[None]:
    """Runs every job that is submitted meanwhile. step_s: seconds for each of the four steps."""
    worker = asyncio.create_task(_work(store, files, step_s))
    try:
        yield
    finally:
        worker.cancel()
        with suppress(asyncio.CancelledError):
            await worker


async def _work(store: JobStore, files: FileStore, step_s: float) -> None:
    async with asyncio.TaskGroup() as group, store.claims.watch_work() as work:
        group.create_task(_sweep(store))
        while True:
            if claim := await store.claims.take(list(ENDPOINTS), LEASE_S):
                group.create_task(_attempt(store, files, claim, step_s))
            else:
                await work.changed(0.2)


async def _sweep(store: JobStore) -> None:
    while True:
        with suppress(StoreAway):  # as the dispatcher does
            await store.claims.sweep()
        await asyncio.sleep(0.2)


async def _attempt(store: JobStore, files: FileStore, claim: Claim, step_s: float) -> None:
    with suppress(LeaseLost):  # the test has deleted the job
        await _render(store, files, claim, step_s)


async def _render(store: JobStore, files: FileStore, claim: Claim, step_s: float) -> None:
    """What the first word of a prompt asks for: "endless" runs until it is cancelled, "held" goes back to the queue for an hour,
    "slow" takes five times as long, "fails" ends in the error that the second word names.
    """
    word, _, rest = str(claim.input.get("prompt", "")).partition(" ")
    if word == "held":
        await store.claims.requeue(claim, "held", counted=True, wait_s=3600)
        return
    step = 0
    while step < 4 or word == "endless":
        step += 1
        progress = StageProgress("denoise", Progress("step", step, 4))
        await store.claims.log(claim, f"step {step}/4", progress=progress.fields())
        await asyncio.sleep(step_s * {"slow": 5, "endless": 5}.get(word, 1))
        if await store.claims.heartbeat(claim, LEASE_S):
            await store.claims.cancel(claim)
            return
    if word == "fails":
        kind: type[ReelrayError] = getattr(errors, rest)
        loc = ("body", "keyframe_0_image_url") if issubclass(kind, ModelError) else ()
        await store.claims.fail(claim, error_failure(kind("", loc)), {"inference_time": 4 * step_s})
        return
    kept = await Dispatcher(store, files, {}, QueueSettings(), RetentionSettings()).keep_file(claim, VIDEO)
    video = {"url": kept.path, "content_type": "video/mp4", "file_name": "video.mp4", "file_size": kept.size}
    await store.claims.succeed(claim, {"video": video, "seed": claim.input["seed"]}, {"inference_time": 4 * step_s})
