"""The application that `serve_config.yaml` deploys: ingress, dispatcher (with a courier) and three stages per endpoint. It is the
only file that knows every deployment.

Placement, replicas and autoscaling are set in the YAML; here each deployment only gets its name and its arguments.
Every replica's process imports this file, so each stage is imported by its own replica only: the ingress and the dispatcher need
no torch.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle

from deployments.dispatch.dispatcher import Dispatcher
from deployments.files.file_store import FileStore
from deployments.hosting.demo_weights import write_missing_weights
from deployments.hosting.embedded_postgres import database_url
from deployments.hosting.logs import configure_logging
from deployments.hosting.nodes import NodeWatch
from deployments.ingress.app import create_app
from deployments.jobs.store import JobStore
from deployments.schemas.endpoint import ENDPOINTS, Endpoint
from deployments.settings import Settings
from deployments.stages.handles import ServeStages, crossing
from deployments.stages.progress import Stage
from deployments.stages.protocol import CheckpointRef
from deployments.webhooks.courier import Courier
from deployments.webhooks.outbox import Outbox
from engines.quick_start import without_collections
from engines.spec import Conditioning, Latents


class DispatcherReplica:
    """Runs a dispatcher and a courier until Serve stops this replica. handles: endpoint id -> its three stages' handles.

    They share a replica because both spend nearly all their time waiting, and any number of each may run.
    """

    def __init__(self, settings: Settings, handles: dict[str, tuple[DeploymentHandle, DeploymentHandle, DeploymentHandle]]):
        configure_logging()
        self.settings = settings
        self.stages = {endpoint: ServeStages(*stages) for endpoint, stages in handles.items()}
        self.task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        url = await asyncio.to_thread(database_url, self.settings)
        store = await JobStore.open(url, upgrades=self.settings.database == "embedded")
        try:
            settings, files = self.settings, FileStore(self.settings.files_url)
            dispatcher = Dispatcher(store, files, self.stages, settings.queue, settings.retention)
            courier = Courier(
                Outbox(store.database),
                settings.webhooks,
                allow_private=settings.fetch.allow_private,
                public_url=settings.public_url,
            )
            async with asyncio.TaskGroup() as group:
                group.create_task(dispatcher.run())
                group.create_task(courier.run())
                group.create_task(NodeWatch(settings, _nodes).watch())
        finally:
            await store.close()

    def check_health(self) -> None:
        """Raises the error that ended either of the two; Serve then starts another replica."""
        if self.task.done():
            self.task.result()

    async def __del__(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])


class PreprocessReplica:
    """Hosts `Preprocess` in Serve; args: its own."""

    def __init__(self, *args: Any):
        with without_collections():
            from deployments.stages.preprocess import Preprocess

            self.wrapper = Preprocess(*args)

    async def run(self, job_input: dict[str, Any], alone: bool) -> AsyncIterator[Any]:
        """See `Preprocess` and `crossing`."""
        items = crossing(self.wrapper.run(job_input, alone))
        async with aclosing(items):
            async for item in items:
                yield item

    async def saved(self, checkpoint: CheckpointRef) -> AsyncIterator[Any]:
        """See `Preprocess` and `crossing`."""
        items = crossing(self.wrapper.saved(checkpoint))
        async with aclosing(items):
            async for item in items:
                yield item


class DenoiseReplica:
    """Hosts `Denoise` in Serve; args: its own. When Serve stops it, it first lets its calls store what they have done.

    Serve counts a call as ended as soon as it is cancelled, and would kill the replica while the call still stops and writes.
    """

    def __init__(self, *args: Any):
        configure_logging()  # before the engines are made ready, which can take minutes
        with without_collections():
            from deployments.stages.denoise import Denoise

            self.wrapper = Denoise(*args)
        self.calls: set[asyncio.Task[Any]] = set()

    async def run(self, conditioning: Conditioning, checkpoint: CheckpointRef) -> AsyncIterator[Any]:
        """See `Denoise` and `crossing`."""
        call = asyncio.current_task()
        assert call is not None  # Serve makes a task for each call
        self.calls.add(call)
        call.add_done_callback(self.calls.discard)
        items = crossing(self.wrapper.run(conditioning, checkpoint))
        async with aclosing(items):
            async for item in items:
                yield item

    async def __del__(self) -> None:
        if self.calls:
            await asyncio.wait(self.calls)


class DecodeReplica:
    """Hosts `Decode` in Serve; args: its own."""

    def __init__(self, *args: Any):
        with without_collections():
            from deployments.stages.decode import Decode

            self.wrapper = Decode(*args)

    async def run(self, latents: Latents) -> AsyncIterator[Any]:
        """See `Decode` and `crossing`."""
        items = crossing(self.wrapper.run(latents))
        async with aclosing(items):
            async for item in items:
                yield item


class IngressReplica:
    """Hosts the ingress app in Serve. dispatcher: given here only so that it is deployed; the two share nothing but the store."""

    def __init__(self, dispatcher: DeploymentHandle):
        configure_logging()
        self.dispatcher = dispatcher


def build(args: Settings) -> serve.Application:
    """The application. Serve parses the YAML's `args` as `Settings` and refuses unknown keys. Raises `Exposed`, `Split`."""
    settings = args
    settings.refuse_exposure(_listening_host())
    settings.refuse_split(_nodes())
    handles: dict[str, Any] = {}
    configs = settings.model_configs()
    files_url, checkpoint_s = settings.files_url, settings.queue.checkpoint_s
    for endpoint in ENDPOINTS.values():
        if endpoint.model in configs:
            config = configs[endpoint.model]
            handles[endpoint.id] = (
                _stage(PreprocessReplica, endpoint, "preprocess").bind(endpoint, config, settings.fetch, files_url),
                _stage(DenoiseReplica, endpoint, "denoise").bind(endpoint.model, config, files_url, checkpoint_s),
                _stage(DecodeReplica, endpoint, "decode").bind(endpoint.model, config),
            )
    write_missing_weights(settings)
    # The time that Serve waits before it first checks whether a stopping replica is idle; it cancels nothing in that time. The
    # stages are shut down meanwhile and calls to them fail, so the dispatcher must give its jobs back before that.
    dispatcher = _deploy(DispatcherReplica, "dispatcher", graceful_shutdown_wait_loop_s=0.1).bind(settings, handles)
    check = NodeWatch(settings, _nodes).check
    ingress = serve.ingress(lambda: create_app(settings, database_url(settings), check))(IngressReplica)
    return _deploy(ingress, "ingress").bind(dispatcher)


def _listening_host() -> str | None:
    """The host that Serve listens on, which a builder is not told; None without Serve.

    The controller that started this build knows it. The YAML does not: its `http_options` only count when Serve starts, and an
    application that is deployed into a running Serve gets that one's host. Ray has no public call for this.
    """
    client = _get_global_client(raise_if_no_controller_running=False) if ray.is_initialized() else None
    return None if client is None else client.http_config.host


def _nodes() -> int:
    """How many nodes the Ray cluster of this process has; 1 without Ray."""
    return sum(node["Alive"] for node in ray.nodes()) if ray.is_initialized() else 1


def _stage(replica: type, endpoint: Endpoint, stage: Stage) -> Any:
    """A stage's deployment, with what fits a small machine where the YAML says nothing of it."""
    calls = 4 if stage == "preprocess" else 2  # the two others work on one at a time; the next waits with its data already here
    options: dict[str, Any] = {"max_ongoing_requests": calls, "health_check_period_s": 2, "ray_actor_options": {"num_cpus": 0.2}}
    if stage == "denoise":
        options["graceful_shutdown_timeout_s"] = 60  # longer than a UNet call and writing a checkpoint take together
    return _deploy(replica, f"{endpoint.family}-{stage}", **options)


def _deploy(replica: type, name: str, **options: Any) -> Any:
    return serve.deployment(replica, name=name, **options)
