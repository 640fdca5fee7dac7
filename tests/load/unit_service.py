"""Samplers and denoise replicas alone on a Ray of this process's own, without the rest of the service."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import ray
from ray import serve

from deployments.app import DenoiseReplica, SamplerReplica, denoising, sampling
from deployments.settings import TelemetrySettings
from deployments.stages.handles import finished
from deployments.stages.protocol import CheckpointRef, Done
from engines import registry
from engines.spec import Latents
from tests.e2e.service import free_port

SLEEPING = "sleeping"


class TestedDenoise(DenoiseReplica):
    """Knows `tests.load.sleeping` too."""

    def __init__(self, *args: Any):
        registry._MODELS[SLEEPING] = "tests.load.sleeping"
        super().__init__(*args)


class TestedSampler(SamplerReplica):
    """Knows `tests.load.sleeping` too."""

    def __init__(self, *args: Any):
        registry._MODELS[SLEEPING] = "tests.load.sleeping"
        super().__init__(*args)


@dataclass
class UnitService:
    """A sampler with its replicas. name: of the application."""

    model: str
    name: str
    handle: Any

    async def denoise(self, conditioning: Any, priority: int = 0) -> tuple[Latents, Done[Any], float]:
        """The latents, the end of the sampler's stream, and the seconds that it all took."""

        async def on_note(_: Any) -> None:
            pass

        reference = ray.put(conditioning)
        checkpoint = CheckpointRef(f"checkpoints/{uuid4()}", used=False)
        began = time.perf_counter()
        response = self.handle.options(stream=True).run.remote(self.model, [reference], checkpoint, priority, None)
        done = await finished(response, on_note)
        latents: Latents = await done.product
        return latents, done, time.perf_counter() - began

    async def cancelled(self, conditioning: Any, after_s: float) -> None:
        """Cancels a job that has run for so long."""
        checkpoint = CheckpointRef(f"checkpoints/{uuid4()}", used=False)
        arguments = (self.model, [ray.put(conditioning)], checkpoint, 0, None)
        response = self.handle.options(stream=True).run.remote(*arguments)
        await anext(response)  # it has begun
        await asyncio.sleep(after_s)
        response.cancel()


@contextmanager
def serving_units(cpus: int = 8) -> Iterator[None]:
    """A Ray and a Serve for this process."""
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        object_store_memory=300_000_000,
        log_to_driver=False,
        configure_logging=False,
    )
    try:
        serve.start(http_options={"port": free_port(), "location": "NoServer"})
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


@contextmanager
def units(model: str, config: Any, replicas: int) -> Iterator[UnitService]:
    """A sampler and so many denoise replicas of a model."""
    name, told = f"{model}-{replicas}", TelemetrySettings()
    with TemporaryDirectory(prefix="reelray-units-") as files:
        denoise = denoising(TestedDenoise, "denoise").options(num_replicas=replicas).bind(told, model, config)
        app = sampling(TestedSampler).bind(told, files, 3600.0, {model: (config, denoise)})
        handle = serve.run(app, name=name, route_prefix=None)
        try:
            yield UnitService(model, name, handle)
        finally:
            serve.delete(name)
