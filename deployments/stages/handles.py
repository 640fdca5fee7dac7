"""Calls of the stages through Ray Serve's handles: both ends of a stream that crosses Ray, calls of a certain replica, and
Ray's errors as ours.
"""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

from ray import ObjectRef
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from deployments import tracing
from deployments.stages import replica_lists
from deployments.stages.protocol import CheckpointRef, Done, Note, OnNote, Started, Stream, UnitCall
from engines.errors import ReelrayError, RunnerDisconnected, RunnerFailed, SamplerLost
from engines.spec import Clip
from engines.units import Report, UnitOutput

T = TypeVar("T")
Lost = type[RunnerDisconnected]

ANY = ""
"""In place of a replica's name: any will do."""


class NamedReplicaRouter(RequestRouter):  # type: ignore[misc]  # Ray is not typed here
    """Sends a call to the replica that its first argument names, or to any if that has gone or is `ANY`.

    It also announces which replicas there are. Serve makes a router for each deployment in every process that calls it.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """See `RequestRouter`."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # where all are full; without it Serve asks again in a busy loop
        name = pending_request.args[0] if pending_request.args else ANY
        return [[each for each in candidate_replicas if each.replica_id.unique_id == name] or candidate_replicas]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """See `RequestRouter`."""
        super().update_replicas(replicas)
        replica_lists.announce(str(self._deployment_id), frozenset(each.replica_id.unique_id for each in replicas))


class ServeReplicas:
    """The replicas of a deployment whose router is `NamedReplicaRouter`, which follows them from here on: see `Replicas`."""

    def __init__(self, handle: DeploymentHandle):
        self._handle = handle
        self._streams = handle.options(stream=True)

    def watch(self, changed: Callable[[frozenset[str]], None]) -> None:
        """See `Replicas`."""
        replica_lists.watch(str(self._handle.deployment_id), changed)

    async def wake(self) -> None:
        """See `Replicas`. A call that waits for a replica makes Serve start one."""
        await self.arithmetic(ANY)

    async def arithmetic(self, replica: str) -> str:
        """See `Replicas`."""
        arithmetic: str = await _answered(self._handle.arithmetic.remote(replica))
        return arithmetic

    async def run(self, replica: str, call: UnitCall, conditioning: Any) -> AsyncGenerator[Report | UnitOutput, None]:
        """See `Replicas`. The conditioning's reference is in a list, so that Ray does not send its bytes with every call."""
        response = self._streams.run.remote(replica, call, [conditioning])
        try:
            async for item in response:
                yield item
        except (RayError, RayServeException) as exc:
            raise translated(exc) from exc

    async def stop(self, replica: str, runs: Sequence[str]) -> None:
        """See `Replicas`."""
        await _answered(self._handle.stop.remote(replica, runs))

    async def forget(self, replica: str, job: str) -> None:
        """See `Replicas`."""
        await _answered(self._handle.forget.remote(replica, job))


async def _answered(response: Any) -> Any:
    try:
        return await response
    except (RayError, RayServeException) as exc:
        raise translated(exc) from exc


class ServeStages:
    """Stages as deployments. Serve retries nothing that a replica has accepted; the dispatcher decides.

    The last argument of each call is the trace that this task belongs to: Ray takes no context to another process.
    """

    def __init__(
        self,
        model: str,
        preprocess: DeploymentHandle,
        sampler: DeploymentHandle,
        decode: DeploymentHandle,
        replicas: ServeReplicas,
    ):
        self._model = model
        self._preprocess = preprocess.options(stream=True)
        self._sampler = sampler.options(stream=True)
        self._decode = decode.options(stream=True)
        self._replicas = replicas

    async def preprocess(self, job_input: dict[str, Any], on_note: OnNote, *, alone: bool = False) -> Done[ObjectRef]:
        """See `Stages`."""
        return await finished(self._preprocess.run.remote(job_input, alone, tracing.current()), on_note)

    async def denoise(
        self, conditioning: ObjectRef, checkpoint: CheckpointRef, on_note: OnNote, *, priority: int = 0
    ) -> Done[ObjectRef]:
        """See `Stages`. Raises `SamplerLost` too. The sampler needs the reference itself, for its replicas."""
        response = self._sampler.run.remote(self._model, [conditioning], checkpoint, priority, tracing.current())
        return await finished(response, on_note, SamplerLost)

    async def saved(self, checkpoint: CheckpointRef, on_note: OnNote) -> ObjectRef | None:
        """See `Stages`."""
        return (await _outcome(self._preprocess.saved.remote(checkpoint, tracing.current()), on_note)).product

    async def decode(self, latents: ObjectRef, on_note: OnNote) -> Done[Clip]:
        """See `Stages`."""
        done = await finished(self._decode.run.remote(latents, tracing.current()), on_note)
        try:
            clip: Clip = await done.product
        except RayError as exc:
            raise translated(exc) from exc
        return replace(done, product=clip)

    def watch_replicas(self, changed: Callable[[int], None]) -> None:
        """See `Stages`."""
        self._replicas.watch(lambda names: changed(len(names)))


async def crossing(stream: Stream[T]) -> AsyncGenerator[Started | Note | Done[None] | T, None]:
    """A stage's stream as a replica sends it through Ray: the product, unless it is None, is an item of its own after `Done`.

    So the caller gets a reference to it without its bytes, and owns it. A reference put into `Done` by the replica would not do:
    Ray drops an object when the process that put it ends, and a replica may be scaled down before the next stage reads.
    """
    async with aclosing(stream):
        async for item in stream:
            if not isinstance(item, Done):
                yield item
                continue
            yield Done(None, item.seconds, item.gpu_seconds, item.receipt, item.busy_s, item.width)
            if item.product is not None:
                yield item.product


async def finished(response: DeploymentResponseGenerator, on_note: OnNote, lost: Lost = RunnerDisconnected) -> Done[ObjectRef]:
    """The end of a stream that must have a product. lost: raised where the stage's replica was lost."""
    done = await _outcome(response, on_note, lost)
    if done.product is None:
        raise lost
    return done


async def _outcome(
    response: DeploymentResponseGenerator, on_note: OnNote, lost: Lost = RunnerDisconnected
) -> Done[ObjectRef | None]:
    """Passes a stream's items on and returns its end as before `crossing`, with a reference to the product."""
    try:
        # Serve's one way to an item's reference instead of its value; marked as for developers, hence the underscore
        refs = await response._to_object_ref_gen()
        async for ref in refs:
            item = await ref
            if isinstance(item, Done):
                return replace(item, product=await anext(refs, None))
            await on_note(item)
    except (RayError, RayServeException) as exc:
        raise translated(exc, lost) from exc
    except BaseException:  # we were cancelled, or could not pass a note on: nobody waits for the rest
        response.cancel()
        raise
    raise lost


def translated(exc: Exception, lost: Lost = RunnerDisconnected) -> ReelrayError:
    """Our own error, where one crossed Ray; `RunnerFailed` for a bug in a stage, `lost` for Ray's own errors."""
    if isinstance(exc, RayTaskError):
        cause = exc.cause
        if isinstance(cause, ReelrayError):
            return cause
        if not isinstance(cause, RayError):
            return RunnerFailed()
    return lost()
