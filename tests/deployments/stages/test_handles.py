import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ObjectLostError, RayError, RayTaskError

from deployments.stages import replica_lists
from deployments.stages.handles import ANY, NamedReplicaRouter, ServeReplicas, ServeStages, crossing, translated
from deployments.stages.protocol import CheckpointRef, Done, Note, OnNote, Started, Stream
from engines.errors import ImageLoadError, RunnerDisconnected, RunnerFailed, SamplerLost
from tests.fakes import CLIP

STAGES = ("preprocess", "denoise", "decode")
CHECKPOINT = CheckpointRef("a name", used=True)


class Response:
    """What a streaming handle returns: a reference to each item. An item None never arrives; an exception is raised."""

    def __init__(self, *items: Any):
        self.items = items
        self.cancelled = False

    async def _to_object_ref_gen(self) -> AsyncIterator[asyncio.Future[Any]]:
        return self._references()

    async def _references(self) -> AsyncIterator[asyncio.Future[Any]]:
        for item in self.items:
            reference = asyncio.get_running_loop().create_future()
            if isinstance(item, Exception):
                reference.set_exception(item)
            elif item is not None:
                reference.set_result(item)
            yield reference

    def cancel(self) -> None:
        self.cancelled = True


def stages_with(response: Response) -> ServeStages:
    """Stages that all return this response."""
    method = SimpleNamespace(remote=lambda *_: response)
    handle: Any = SimpleNamespace(run=method, saved=method)
    handle.options = lambda *, stream: handle
    return ServeStages("a model", handle, handle, handle, ServeReplicas(handle))


async def call(stages: ServeStages, stage: str, on_note: OnNote) -> Any:
    return await (stages.denoise(None, CHECKPOINT, on_note) if stage == "denoise" else getattr(stages, stage)(None, on_note))


async def nobody(_: Started | Note) -> None:
    pass


def crossed(cause: Exception) -> RayError:
    """An error as Ray raises it in the caller of a task that raised `cause`."""
    return RayTaskError("run", "a traceback with pid 7 at 10.0.0.7", cause).as_instanceof_cause()


def test_our_own_error_comes_back_as_it_was_raised():
    error = translated(crossed(ImageLoadError("damaged", ("body", "x"), {"a": 1})))
    assert type(error) is ImageLoadError
    assert (error.message, error.loc, error.ctx) == ("damaged", ("body", "x"), {"a": 1})


def test_a_bug_in_a_stage_is_a_failure_that_tells_nothing():
    error = translated(crossed(RuntimeError("CUDA error at 10.0.0.7")))
    assert type(error) is RunnerFailed
    assert not error.retryable
    assert "10.0.0.7" not in error.message


@pytest.mark.parametrize("trouble", [ActorDiedError(), ObjectLostError("a" * 56, None, ""), crossed(ActorDiedError())])
def test_rays_troubles_are_worth_another_try(trouble: Exception):
    assert type(translated(trouble)) is RunnerDisconnected
    assert translated(trouble).retryable


@pytest.mark.parametrize("stage", STAGES)
async def test_notes_are_passed_on_and_only_the_clip_comes_by_value(stage: str):
    told: list[str] = []

    async def on_note(note: Note) -> None:
        told.append(note.message)

    stages = stages_with(Response(Note("frame 1/2"), Note("frame 2/2"), Done(None, 0.5), CLIP))
    done = await call(stages, stage, on_note)
    assert told == ["frame 1/2", "frame 2/2"]
    assert done.seconds == 0.5
    assert (done.product is CLIP) == (stage == "decode")


@pytest.mark.parametrize("stage", STAGES)
async def test_a_cancelled_call_cancels_the_work_behind_it(stage: str):
    response = Response(Note("frame 1/2"), None)
    heard = asyncio.Event()

    async def on_note(_: Note) -> None:
        heard.set()

    calling = asyncio.create_task(call(stages_with(response), stage, on_note))
    await heard.wait()
    assert not response.cancelled
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    assert response.cancelled


@pytest.mark.parametrize(
    "items", [(Note("frame 1/2"), ActorDiedError()), (Done(None, 0.5), ActorDiedError()), (Note("frame 1/2"),)]
)
async def test_a_clip_that_is_lost_is_worth_another_try(items: tuple[Any, ...]):
    with pytest.raises(RunnerDisconnected):
        await stages_with(Response(*items)).decode(None, nobody)


async def test_the_loss_of_a_sampler_is_told_from_that_of_replicas_which_a_unit_ended():
    for trouble in (ActorDiedError(), crossed(ActorDiedError())):
        with pytest.raises(SamplerLost):
            await stages_with(Response(Started(), trouble)).denoise(None, CHECKPOINT, nobody)
    with pytest.raises(RunnerDisconnected) as error:
        await stages_with(Response(Started(), crossed(RunnerDisconnected()))).denoise(None, CHECKPOINT, nobody)
    assert type(error.value) is RunnerDisconnected


async def test_finished_latents_come_unread_and_their_absence_is_no_error():
    assert await stages_with(Response(Done(None, 0.0))).saved(CHECKPOINT, nobody) is None
    assert await (await stages_with(Response(Note("resumed"), Done(None, 0.0), CLIP)).saved(CHECKPOINT, nobody)) is CLIP  # type: ignore[misc]
    with pytest.raises(RunnerDisconnected):
        await stages_with(Response(ActorDiedError())).saved(CHECKPOINT, nobody)


@pytest.mark.parametrize(("product", "crosses"), [(CLIP, [CLIP]), (None, [])])
async def test_a_product_crosses_ray_as_an_item_of_its_own_behind_its_end(product: Any, crosses: list[Any]):
    closed: list[bool] = []

    async def stream() -> Stream[Any]:
        try:
            yield Started()
            yield Note("frame 1/1")
            yield Done(product, 0.5)
        finally:
            closed.append(True)

    items = [item async for item in crossing(stream())]
    assert items == [Started(), Note("frame 1/1"), Done(None, 0.5), *crosses]
    left = crossing(stream())
    await anext(left)
    await left.aclose()
    assert closed == [True, True]
    found = await stages_with(Response(*items)).saved(CHECKPOINT, nobody)
    assert (found and await found) is product  # type: ignore[misc]


async def test_a_call_goes_to_the_replica_that_it_names_or_to_any_if_that_has_gone():
    candidates: list[Any] = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in ("a", "b")]
    router = NamedReplicaRouter.__new__(NamedReplicaRouter)  # Serve's own constructor needs a controller

    async def chosen(*args: Any) -> list[str]:
        context = SimpleNamespace(should_backoff=False)
        pending: Any = SimpleNamespace(args=args, routing_context=context)
        (found,) = await router.choose_replicas(candidates, pending)
        assert context.should_backoff, "else Serve asks again without a pause where all are full"
        return [each.replica_id.unique_id for each in found]

    assert await chosen("b", "more") == ["b"]
    assert await chosen("gone") == await chosen(ANY) == await chosen() == ["a", "b"]


async def test_watchers_hear_of_their_deployments_replicas_at_once_and_later():
    heard: list[frozenset[str]] = []
    replica_lists.announce("one", frozenset("a"))
    replica_lists.watch("one", heard.append)
    replica_lists.announce("another", frozenset("x"))
    await asyncio.to_thread(replica_lists.announce, "one", frozenset("ab"))
    await asyncio.sleep(0)
    assert heard == [frozenset("a"), frozenset("ab")]
