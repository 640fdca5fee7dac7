"""The application that `serve_config.yaml` deploys: ingress, dispatcher (with a courier), sampler, and three stages per endpoint.
It is the only file that knows every deployment.

Placement is set in the YAML; here each deployment only gets its name, its arguments and, from the settings, the bounds of its
replicas. Within them `hosting/scaler.py` decides.
Every replica's process imports this file, so each stage is imported by its own replica only: the ingress and the dispatcher need
no torch.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle

from deployments import tracing
from deployments.dispatch.dispatcher import Dispatcher
from deployments.dispatch.queue_gauges import QueueGauges
from deployments.files.file_store import FileStore
from deployments.hosting.demo_weights import write_missing_weights
from deployments.hosting.embedded_postgres import database_url
from deployments.hosting.nodes import NodeWatch
from deployments.hosting.telemetry import begin_telemetry
from deployments.ingress.app import create_app
from deployments.jobs.store import JobStore
from deployments.schemas.endpoint import ENDPOINTS, Endpoint
from deployments.settings import Settings, StageScaling, TelemetrySettings
from deployments.stages import device_memory
from deployments.stages.handles import NamedReplicaRouter, ServeReplicas, ServeStages, crossing
from deployments.stages.progress import Stage
from deployments.stages.protocol import CheckpointRef, UnitCall
from deployments.webhooks.courier import Courier
from deployments.webhooks.outbox import Outbox
from engines.quick_start import without_collections
from engines.spec import Conditioning, Latents

SMALL: dict[str, Any] = {"health_check_period_s": 2, "ray_actor_options": {"num_cpus": 0.1}}
"""What fits a small machine."""


@dataclass(frozen=True)
class StageHandles:
    """The stages of an endpoint as the dispatcher reaches them. denoise: only to see how many replicas there are."""

    model: str
    preprocess: DeploymentHandle
    denoise: DeploymentHandle
    decode: DeploymentHandle


class DispatcherReplica:
    """Runs a dispatcher and a courier until Serve stops this replica. handles: endpoint id -> its stages.

    They share a replica because both spend nearly all their time waiting, and any number of each may run.
    """

    def __init__(self, settings: Settings, sampler: DeploymentHandle | None, handles: dict[str, StageHandles]):
        begin_telemetry(settings.telemetry, "dispatcher", in_ray=True)
        self.settings = settings
        self.stages = {
            endpoint: ServeStages(each.model, each.preprocess, sampler, each.decode, ServeReplicas(each.denoise))
            for endpoint, each in handles.items()
        }
        self.task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        url = await asyncio.to_thread(database_url, self.settings)
        store = await JobStore.open(url, upgrades=self.settings.database == "embedded")
        try:
            settings, files = self.settings, FileStore(self.settings.files_url)
            dispatcher = Dispatcher(store, files, self.stages, settings.queue, settings.retention)
            outbox = Outbox(store.database)
            courier = Courier(
                outbox,
                settings.webhooks,
                allow_private=settings.fetch.allow_private,
                public_url=settings.public_url,
            )
            async with asyncio.TaskGroup() as group:
                group.create_task(dispatcher.run())
                group.create_task(courier.run())
                group.create_task(QueueGauges(store, outbox, self.stages).run())
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


class StageReplica:
    """What the replicas of all stages have in common."""

    def check_health(self) -> None:
        """Raises if the process can no longer compute; Serve then starts another replica."""
        device_memory.check()


class PreprocessReplica(StageReplica):
    """Hosts `Preprocess` in Serve; args: its own. In all three stages a call's last argument is the trace that it belongs to."""

    def __init__(self, telemetry: TelemetrySettings, *args: Any):
        begin_telemetry(telemetry, "preprocess", in_ray=True)
        with without_collections():
            from deployments.stages.preprocess import Preprocess

            self.wrapper = Preprocess(*args)

    async def run(self, job_input: dict[str, Any], alone: bool, traceparent: str | None) -> AsyncIterator[Any]:
        """See `Preprocess` and `crossing`."""
        tracing.enter(traceparent)
        items = crossing(self.wrapper.run(job_input, alone))
        async with aclosing(items):
            async for item in items:
                yield item

    async def saved(self, checkpoint: CheckpointRef, traceparent: str | None) -> AsyncIterator[Any]:
        """See `Preprocess` and `crossing`."""
        tracing.enter(traceparent)
        items = crossing(self.wrapper.saved(checkpoint))
        async with aclosing(items):
            async for item in items:
                yield item


class SamplerReplica:
    """Hosts a `Sampler` for each model in Serve. When Serve stops it, it first lets its calls store what they have done.

    Serve counts a call as ended as soon as it is cancelled, and would kill the replica while the call still stops and writes.
    """

    def __init__(
        self,
        telemetry: TelemetrySettings,
        files_url: str,
        checkpoint_s: float,
        models: dict[str, tuple[Any, DeploymentHandle]],
    ):
        begin_telemetry(telemetry, "sampler", in_ray=True)
        with without_collections():
            from deployments.stages.sampler import Sampler

            self.samplers = {
                model: Sampler(model, config, files_url, checkpoint_s, ServeReplicas(denoise))
                for model, (config, denoise) in models.items()
            }
        self.calls: set[asyncio.Task[Any]] = set()

    async def run(
        self,
        model: str,
        conditioning: list[ray.ObjectRef],
        checkpoint: CheckpointRef,
        priority: int,
        traceparent: str | None,
    ) -> AsyncIterator[Any]:
        """See `Sampler` and `crossing`. conditioning: one reference, in a list so that it comes as such."""
        tracing.enter(traceparent)
        call = asyncio.current_task()
        assert call is not None  # Serve makes a task for each call
        self.calls.add(call)
        call.add_done_callback(self.calls.discard)
        (reference,) = conditioning
        items = crossing(self.samplers[model].run(await reference, reference, checkpoint, priority))
        async with aclosing(items):
            async for item in items:
                yield item

    async def __del__(self) -> None:
        if self.calls:
            await asyncio.wait(self.calls)


class DenoiseReplica(StageReplica):
    """Hosts `Denoise` in Serve; args: its own. The first argument of every call is for the router: whom it is for."""

    def __init__(self, telemetry: TelemetrySettings, *args: Any):
        begin_telemetry(telemetry, "denoise", in_ray=True)  # before the engines are made ready, which can take minutes
        with without_collections():
            from deployments.stages.denoise import Denoise

            self.wrapper = Denoise(*args)

    async def arithmetic(self, _: str) -> str:
        """See `Denoise`."""
        return self.wrapper.arithmetic()

    async def run(self, _: str, call: UnitCall, conditioning: list[ray.ObjectRef]) -> AsyncIterator[Any]:
        """See `Denoise`. conditioning: one reference, in a list so that only the first unit of a job here gets its bytes."""
        tracing.enter(call.traceparent)
        (reference,) = conditioning

        async def fetch() -> Conditioning:
            fetched: Conditioning = await reference
            return fetched

        items = self.wrapper.run(call, fetch)
        async with aclosing(items):
            async for item in items:
                yield item

    async def stop(self, _: str, runs: Sequence[str]) -> None:
        """See `Denoise`."""
        self.wrapper.stop(runs)

    async def forget(self, _: str, job: str) -> None:
        """See `Denoise`."""
        self.wrapper.forget(job)


class DecodeReplica(StageReplica):
    """Hosts `Decode` in Serve; args: its own."""

    def __init__(self, telemetry: TelemetrySettings, *args: Any):
        begin_telemetry(telemetry, "decode", in_ray=True)
        with without_collections():
            from deployments.stages.decode import Decode

            self.wrapper = Decode(*args)

    async def run(self, latents: Latents, traceparent: str | None) -> AsyncIterator[Any]:
        """See `Decode` and `crossing`."""
        tracing.enter(traceparent)
        items = crossing(self.wrapper.run(latents))
        async with aclosing(items):
            async for item in items:
                yield item


class IngressReplica:
    """Hosts the ingress app in Serve. dispatcher: given here only so that it is deployed; the two share nothing but the store."""

    def __init__(self, telemetry: TelemetrySettings, dispatcher: DeploymentHandle):
        begin_telemetry(telemetry, "ingress", in_ray=True)
        self.dispatcher = dispatcher


def build(args: Settings) -> serve.Application:
    """The application. Serve parses the YAML's `args` as `Settings` and refuses unknown keys. Raises `Exposed`, `Split`."""
    settings = args
    settings.refuse_exposure(_listening_host())
    settings.refuse_split(_nodes())
    handles: dict[str, Any] = {}
    models: dict[str, Any] = {}
    configs = settings.model_configs()
    told = settings.telemetry
    for endpoint in ENDPOINTS.values():
        if endpoint.model in configs:
            config = configs[endpoint.model]
            denoise = _stage(settings, DenoiseReplica, endpoint, "denoise").bind(told, endpoint.model, config)
            models[endpoint.model] = (config, denoise)
            handles[endpoint.id] = StageHandles(
                endpoint.model,
                _stage(settings, PreprocessReplica, endpoint, "preprocess").bind(
                    told, endpoint, config, settings.fetch, settings.files_url
                ),
                denoise,
                _stage(settings, DecodeReplica, endpoint, "decode").bind(told, endpoint.model, config),
            )
    write_missing_weights(settings)
    # The time that Serve waits before it first checks whether a stopping replica is idle; it cancels nothing in that time. The
    # stages are shut down meanwhile and calls to them fail, so the dispatcher must give its jobs back before that.
    sampler = sampling(SamplerReplica).bind(told, settings.files_url, settings.queue.checkpoint_s, models) if models else None
    dispatcher = _deploy(DispatcherReplica, "dispatcher", graceful_shutdown_wait_loop_s=0.1).bind(settings, sampler, handles)
    check = NodeWatch(settings, _nodes).check
    ingress = serve.ingress(lambda: create_app(settings, database_url(settings), check))(IngressReplica)
    return _deploy(ingress, "ingress").bind(told, dispatcher)


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


def _stage(settings: Settings, replica: type, endpoint: Endpoint, stage: Stage) -> Any:
    """A stage's deployment, with what fits a small machine where the YAML says nothing of it."""
    name = f"{endpoint.family}-{stage}"
    # decoding works on one call at a time, and the next waits with its data already here
    calls = {"preprocess": 4, "denoise": 32, "decode": 2}[stage]
    bounds: StageScaling = getattr(settings.scaling_of(endpoint), stage)
    scaling = {  # within these bounds the policy decides, and it has delays of its own: Serve's would be added to them
        "min_replicas": bounds.min,
        "max_replicas": bounds.max,
        "target_ongoing_requests": calls,
        "upscale_delay_s": 0,
        "downscale_delay_s": 0,
    }
    if stage == "denoise":
        return denoising(replica, name, autoscaling_config=scaling)
    return _deploy(replica, name, max_ongoing_requests=calls, autoscaling_config=scaling, **SMALL)


def denoising(replica: type, name: str, **options: Any) -> Any:
    """The deployment of replicas that run units."""
    return _deploy(
        replica,
        name,
        max_ongoing_requests=32,  # each sampler has two units here, and asks other things
        graceful_shutdown_timeout_s=60,  # longer than a unit takes
        request_router_config=RequestRouterConfig(request_router_class=NamedReplicaRouter),
        **SMALL,
        **options,
    )


def sampling(replica: type, name: str = "sampler") -> Any:
    """The deployment of samplers, for all endpoints: they compute little. Each call is a job, which has a thread there."""
    return _deploy(
        replica,
        name,
        max_ongoing_requests=64,
        graceful_shutdown_timeout_s=60,  # longer than writing a checkpoint takes
        **SMALL,
    )


def _deploy(replica: type, name: str, **options: Any) -> Any:
    return serve.deployment(replica, name=name, **options)
