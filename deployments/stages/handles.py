"""Calls of the three stages through Ray Serve's handles: both ends of a stream that crosses Ray, and Ray's errors as ours."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, TypeVar

from ray import ObjectRef
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from deployments.stages.protocol import CheckpointRef, Done, Note, OnNote, Started, Stream
from engines.errors import ReelrayError, RunnerDisconnected, RunnerFailed
from engines.spec import Clip

T = TypeVar("T")


class ServeStages:
    """Stages as deployments. Serve retries nothing that a replica has accepted; the dispatcher decides."""

    def __init__(self, preprocess: DeploymentHandle, denoise: DeploymentHandle, decode: DeploymentHandle):
        self._preprocess = preprocess.options(stream=True)
        self._denoise = denoise.options(stream=True)
        self._decode = decode.options(stream=True)

    async def preprocess(self, job_input: dict[str, Any], on_note: OnNote, *, alone: bool = False) -> Done[ObjectRef]:
        """See `Stages`."""
        return await _finished(self._preprocess.run.remote(job_input, alone), on_note)

    async def denoise(self, conditioning: ObjectRef, checkpoint: CheckpointRef, on_note: OnNote) -> Done[ObjectRef]:
        """See `Stages`."""
        return await _finished(self._denoise.run.remote(conditioning, checkpoint), on_note)

    async def saved(self, checkpoint: CheckpointRef, on_note: OnNote) -> ObjectRef | None:
        """See `Stages`."""
        return (await _outcome(self._preprocess.saved.remote(checkpoint), on_note)).product

    async def decode(self, latents: ObjectRef, on_note: OnNote) -> Done[Clip]:
        """See `Stages`."""
        done = await _finished(self._decode.run.remote(latents), on_note)
        try:
            clip: Clip = await done.product
        except RayError as exc:
            raise translated(exc) from exc
        return Done(clip, done.seconds)


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
            yield Done(None, item.seconds)
            if item.product is not None:
                yield item.product


async def _finished(response: DeploymentResponseGenerator, on_note: OnNote) -> Done[ObjectRef]:
    """The end of a stream that must have a product."""
    done = await _outcome(response, on_note)
    if done.product is None:
        raise RunnerDisconnected
    return done


async def _outcome(response: DeploymentResponseGenerator, on_note: OnNote) -> Done[ObjectRef | None]:
    """Passes a stream's items on and returns its end as before `crossing`, with a reference to the product."""
    try:
        # Serve's one way to an item's reference instead of its value; marked as for developers, hence the underscore
        refs = await response._to_object_ref_gen()
        async for ref in refs:
            item = await ref
            if isinstance(item, Done):
                return Done(await anext(refs, None), item.seconds)
            await on_note(item)
    except (RayError, RayServeException) as exc:
        raise translated(exc) from exc
    except BaseException:  # we were cancelled, or could not pass a note on: nobody waits for the rest
        response.cancel()
        raise
    raise RunnerDisconnected


def translated(exc: Exception) -> ReelrayError:
    """Our own error, where one crossed Ray; `RunnerFailed` for a bug in a stage, `RunnerDisconnected` for Ray's own errors."""
    if isinstance(exc, RayTaskError):
        cause = exc.cause
        if isinstance(cause, ReelrayError):
            return cause
        if not isinstance(cause, RayError):
            return RunnerFailed()
    return RunnerDisconnected()
