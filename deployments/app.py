"""The graph that `serve_config.yaml` deploys: ingress, dispatcher (with a courier beside it) and three stages an endpoint; the
only file that knows all.

Placement, replicas and autoscaling are the YAML's: what stands here are only each deployment's name and arguments.
"""

import asyncio
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
from deployments.ingress.app import create_app
from deployments.jobs.store import JobStore
from deployments.schemas.endpoint import ENDPOINTS
from deployments.settings import Settings
from deployments.stages.decode import Decode
from deployments.stages.denoise import Denoise
from deployments.stages.handles import ServeStages
from deployments.stages.preprocess import Preprocess
from deployments.stages.protocol import CheckpointRef, Stream
from deployments.webhooks.courier import Courier
from deployments.webhooks.outbox import Outbox
from engines.spec import Conditioning


class DispatcherReplica:
    """Runs a dispatcher and a courier for as long as Serve wants this replica. handles: endpoint id -> its three stages' handles.

    Together, because both nearly always wait and may be any number: there is nothing to place or to scale apart.
    """

    def __init__(self, settings: Settings, handles: dict[str, tuple[DeploymentHandle, DeploymentHandle, DeploymentHandle]]):
        configure_logging()
        self.settings = settings
        self.stages = {endpoint: ServeStages(*stages) for endpoint, stages in handles.items()}
        self.task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        store = await JobStore.open(await asyncio.to_thread(database_url, self.settings))
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
        finally:
            await store.close()

    def check_health(self) -> None:
        """Raises what ended either of the two, and Serve starts another replica."""
        if self.task.done():
            self.task.result()

    async def __del__(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])


class DenoiseReplica(Denoise):
    """Denoises until Serve wants it no longer, and then until what its calls have done is kept.

    Serve counts a call as ended as soon as it is cancelled, and would kill the replica while that one still stops and writes.
    """

    def __init__(self, *args: Any):
        configure_logging()  # before the engines are made ready, which takes its time
        super().__init__(*args)
        self.calls: set[asyncio.Task[Any]] = set()

    async def run(self, conditioning: Conditioning, checkpoint: CheckpointRef) -> Stream:
        """See `Denoise`."""
        call = asyncio.current_task()
        assert call is not None  # Serve's, one a call
        self.calls.add(call)
        call.add_done_callback(self.calls.discard)
        stream: Any = super().run(conditioning, checkpoint)
        async with aclosing(stream):
            async for item in stream:
                yield item

    async def __del__(self) -> None:
        if self.calls:
            await asyncio.wait(self.calls)


class IngressReplica:
    """Hosts the ingress app in Serve. dispatcher: bound here so that it is deployed; the two meet in the store only."""

    def __init__(self, dispatcher: DeploymentHandle):
        configure_logging()
        self.dispatcher = dispatcher


def build(args: Settings) -> serve.Application:
    """The application. Serve reads `args` of the YAML as `Settings` and refuses what they do not know. Raises `Exposed`."""
    settings = args
    settings.refuse_exposure(_listening_host())
    handles: dict[str, Any] = {}
    configs = settings.model_configs()
    files_url, checkpoint_s = settings.files_url, settings.queue.checkpoint_s
    for endpoint in ENDPOINTS.values():
        if endpoint.model in configs:
            config = configs[endpoint.model]
            handles[endpoint.id] = (
                _deploy(Preprocess, f"{endpoint.family}-preprocess").bind(endpoint, config, settings.fetch, files_url),
                _deploy(DenoiseReplica, f"{endpoint.family}-denoise").bind(endpoint.model, config, files_url, checkpoint_s),
                _deploy(Decode, f"{endpoint.family}-decode").bind(endpoint.model, config),
            )
    write_missing_weights(settings)
    # Serve calls off nothing, but waits this long before it first looks whether a replica has nothing to do. The stages are being
    # shut down meanwhile, and calls to them fail: the dispatcher is to give its jobs back before that.
    dispatcher = _deploy(DispatcherReplica, "dispatcher", graceful_shutdown_wait_loop_s=0.1).bind(settings, handles)
    ingress = serve.ingress(lambda: create_app(settings, database_url(settings)))(IngressReplica)
    return _deploy(ingress, "ingress").bind(dispatcher)


def _listening_host() -> str | None:
    """Where Serve listens, which a builder is not told; None where there is no Serve.

    Asked of the controller that started this build, because the YAML's `http_options` only count when Serve starts: what is
    deployed into a running Serve gets that one's host. No public call tells it.
    """
    client = _get_global_client(raise_if_no_controller_running=False) if ray.is_initialized() else None
    return None if client is None else client.http_config.host


def _deploy(replica: type, name: str, **options: Any) -> Any:
    return serve.deployment(replica, name=name, **options)
