"""The three stages behind Ray Serve's handles, and Ray's errors in our words."""

from typing import Any

from ray import ObjectRef
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from deployments.stages.protocol import CheckpointRef, Done, OnNote
from engines.errors import ReelrayError, RunnerDisconnected, RunnerFailed
from engines.spec import Clip


class ServeStages:
    """Stages as deployments. Serve retries nothing that a replica has accepted; the dispatcher decides."""

    def __init__(self, preprocess: DeploymentHandle, denoise: DeploymentHandle, decode: DeploymentHandle):
        self._preprocess = preprocess.options(stream=True)
        self._denoise = denoise.options(stream=True)
        self._decode = decode.options(stream=True)

    async def preprocess(self, job_input: dict[str, Any], on_note: OnNote) -> tuple[ObjectRef, float]:
        """See `Stages`."""
        return await _product(self._preprocess.run.remote(job_input), on_note)

    async def denoise(self, conditioning: ObjectRef, checkpoint: CheckpointRef, on_note: OnNote) -> tuple[ObjectRef, float]:
        """See `Stages`."""
        return await _product(self._denoise.run.remote(conditioning, checkpoint), on_note)

    async def saved(self, checkpoint: CheckpointRef, on_note: OnNote) -> ObjectRef | None:
        """See `Stages`."""
        product, _ = await _outcome(self._preprocess.saved.remote(checkpoint), on_note)
        return product

    async def decode(self, latents: ObjectRef, on_note: OnNote) -> tuple[Clip, float]:
        """See `Stages`."""
        product, seconds = await _product(self._decode.run.remote(latents), on_note)
        try:
            clip: Clip = await product
        except RayError as exc:
            raise translated(exc) from exc
        return clip, seconds


async def _product(response: DeploymentResponseGenerator, on_note: OnNote) -> tuple[ObjectRef, float]:
    """The outcome of a stream that must have a product."""
    product, seconds = await _outcome(response, on_note)
    if product is None:
        raise RunnerDisconnected
    return product, seconds


async def _outcome(response: DeploymentResponseGenerator, on_note: OnNote) -> tuple[ObjectRef | None, float]:
    """Passes the stream's notes on and returns its product, if it has one, unread, with the seconds it took."""
    try:
        # Serve's one way to an item's reference instead of its value; marked as for developers, hence the underscore
        refs = await response._to_object_ref_gen()
        async for ref in refs:
            item = await ref
            if isinstance(item, Done):
                return await anext(refs, None), item.seconds
            await on_note(item)
    except (RayError, RayServeException) as exc:
        raise translated(exc) from exc
    except BaseException:  # we were cancelled, or could not pass a note on: nobody waits for the rest
        response.cancel()
        raise
    raise RunnerDisconnected


def translated(exc: Exception) -> ReelrayError:
    """Our own error, where one crossed Ray; `RunnerFailed` for a bug in a stage, `RunnerDisconnected` for Ray's troubles."""
    if isinstance(exc, RayTaskError):
        cause = exc.cause
        if isinstance(cause, ReelrayError):
            return cause
        if not isinstance(cause, RayError):
            return RunnerFailed()
    return RunnerDisconnected()
