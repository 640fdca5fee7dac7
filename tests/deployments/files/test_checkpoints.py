"""Which checkpoints a sampler writes, and how it uses those that it finds."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.files.checkpoints import Checkpoints
from deployments.files.file_store import FileStore
from deployments.schemas.endpoint import ENDPOINTS
from deployments.settings import FetchSettings
from deployments.stages.preprocess import Preprocess
from deployments.stages.protocol import CheckpointRef, Done, Note, Started, UnitCall
from deployments.stages.sampler import Sampler
from engines.animatediff.config import AnimateDiffConfig
from engines.errors import Cancelled, GenerationFailed
from engines.spec import Checkpoint, Conditioning, Latents, Progress
from engines.units import Unit, UnitOutput
from tests.fakes import ENDPOINT
from tests.patience import PATIENCE_S

NAME = "checkpoints/0190aaaa-0000-7000-8000-000000000001"
FIRST, AGAIN = CheckpointRef(NAME, used=False), CheckpointRef(NAME, used=True)
STATE = torch.Generator().get_state()
STEPS = 6
LONG_S = 3600.0
"""Longer than a test may take."""
CONFIG = AnimateDiffConfig()


def asked(seed: int = 1) -> Conditioning:
    return Conditioning(seed, STEPS, 1.0, STATE, ())


def reached(step: int) -> Checkpoint:
    return Checkpoint(step, STEPS, torch.full((1, 4, 2, 2, 2), float(step)), STATE)


@dataclass(frozen=True, kw_only=True)
class Step(Unit):
    done: int


class Stage:
    """A model's sampler, and the replica that runs its units.

    before: called before each step with the number of steps done. began_at: the step at which each call began.
    runs: what really runs the steps. held_at: with so many steps done the unit ends only once it is to stop.
    """

    def __init__(self, before: Callable[[int], None] = lambda _: None, runs: str = "eager", held_at: int | None = None):
        self.before = before
        self.runs = runs
        self.held_at = held_at
        self.stopped: set[str] = set()
        self.began_at: list[int] = []

    def sample(self, conditioning: Any, runner: Any, *, resume: Any, on_step: Any, on_progress: Any) -> Latents:
        start = resume.step if resume else 0
        self.began_at.append(start)
        ran = "+".join(sorted({self.runs} | set(resume.engine.split("+") if resume else ())))  # as `run_steps`
        for done in range(start, STEPS):
            list(runner.run([Step(size=1.0, done=done)], lambda _: None))
            on_step(replace(reached(done + 1), engine=ran))
            on_progress(Progress("step", done + 1, STEPS))
        return Latents(torch.full((1, 4, 2, 2, 2), 99.0), conditioning.seed, engine=ran)

    def watch(self, changed: Callable[[frozenset[str]], None]) -> None:
        changed(frozenset({"a replica"}))

    async def arithmetic(self, replica: str) -> str:
        return ""

    async def run(self, replica: str, call: UnitCall, conditioning: Any) -> AsyncIterator[UnitOutput]:
        assert isinstance(call.unit, Step)
        await asyncio.to_thread(self.before, call.unit.done)
        while call.unit.done == self.held_at and call.run not in self.stopped:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        if call.run in self.stopped:
            raise Cancelled
        yield UnitOutput(torch.zeros(1), self.runs)

    async def stop(self, replica: str, runs: Any) -> None:
        self.stopped |= set(runs)

    async def forget(self, replica: str, job: str) -> None:
        pass


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "files")


@pytest.fixture
def replica(monkeypatch: pytest.MonkeyPatch, url: str) -> Callable[..., Sampler]:
    def build(stage: Any, checkpoint_s: float = 1e-6, config: Any = CONFIG) -> Sampler:
        monkeypatch.setattr("deployments.stages.sampler.build_stage", lambda *_: stage)
        return Sampler("a model", config, url, checkpoint_s, stage)

    return build


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The checkpoints written, in order: step numbers, and "latents"."""
    seen: list[Any] = []
    write = Checkpoints.write

    async def watched(self: Checkpoints, name: str, value: Any, fingerprint: Any) -> None:
        await write(self, name, value, fingerprint)
        seen.append(value.step if isinstance(value, Checkpoint) else "latents")

    monkeypatch.setattr(Checkpoints, "write", watched)
    return seen


def plain(item: Any) -> Any:
    """A step's note without its stage and the time left."""
    at = item.progress.at if isinstance(item, Note) and item.progress else None
    return item if at is None else Note(f"{at.unit} {at.done}/{at.total}")


async def listen(replica: Sampler, checkpoint: CheckpointRef, seed: int = 1) -> list[Any]:
    return [plain(item) async for item in replica.run(asked(seed), None, checkpoint)]


async def interrupt(replica: Sampler, after: str, seed: int = 1) -> None:
    """Stops listening after a note."""
    async with aclosing(replica.run(asked(seed), None, FIRST)) as stream:
        async for item in stream:
            if plain(item) == Note(after):
                return


def slowly(_: int) -> None:
    time.sleep(0.03)


async def test_the_latents_are_kept_before_they_are_handed_on(replica: Callable[..., Sampler]):
    one = replica(Stage(), checkpoint_s=LONG_S)
    *_, done = await listen(one, FIRST)
    kept = await one.checkpoints.latents(NAME)
    assert kept is not None
    assert torch.equal(kept.values, done.product.values)
    assert kept.seed == done.product.seed


async def test_the_replicas_are_free_while_the_latents_are_written(
    replica: Callable[..., Sampler], monkeypatch: pytest.MonkeyPatch
):
    one = replica(Stage(), checkpoint_s=LONG_S)
    free = []

    async def write(*_: Any) -> None:
        free.append(one.pool.scheduler.at_rest)

    monkeypatch.setattr(one.checkpoints, "write", write)
    await listen(one, FIRST)
    assert free == [True]


async def test_steps_are_kept_no_more_often_than_asked_for(
    replica: Callable[..., Sampler], written: list[Any], monkeypatch: pytest.MonkeyPatch
):
    await listen(replica(Stage(slowly), checkpoint_s=LONG_S), FIRST)
    assert written == ["latents"], "a short job's steps are not written"
    written.clear()
    clock, loop = [1000.0], asyncio.get_running_loop()

    def advance(done: int) -> None:
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result()  # the last step has been offered
        while done and done % 2 == 0 and done not in written:
            time.sleep(0.005)
        clock[0] += 1

    monkeypatch.setattr("deployments.files.checkpoints.monotonic", lambda: clock[0])
    await listen(replica(Stage(advance), checkpoint_s=2), FIRST)
    assert written == [2, 4, 6, "latents"]


async def test_a_slow_disk_holds_up_no_step_and_gets_the_newest(
    replica: Callable[..., Sampler], written: list[Any], monkeypatch: pytest.MonkeyPatch
):
    put = FileStorePut()
    monkeypatch.setattr("deployments.files.file_store.FileStore.put_checkpoint", put.slow)
    one = replica(Stage(slowly))
    stream = one.run(asked(), None, FIRST)
    notes = [plain(await anext(stream)) for _ in range(1 + STEPS)]
    assert notes[-1] == Note(f"step {STEPS}/{STEPS}")
    assert written == [], "the first one is still being written"
    put.done.set()
    [done] = [item async for item in stream]
    assert isinstance(done, Done)
    assert isinstance(done.product, Latents)
    assert written == [1, "latents"]


class FileStorePut:
    def __init__(self) -> None:
        self.done = asyncio.Event()

    async def slow(self, *_: Any) -> None:
        await self.done.wait()


async def test_a_cancelled_call_keeps_its_last_step(replica: Callable[..., Sampler], written: list[Any]):
    stage = Stage(held_at=3)
    one = replica(stage, checkpoint_s=LONG_S)
    await interrupt(one, f"step 3/{STEPS}")
    assert written == [3]
    stage.held_at = None
    items = await listen(one, AGAIN)
    assert items[:3] == [Started(), Note(f"resumed at step 3/{STEPS}"), Note(f"step 4/{STEPS}")]
    assert stage.began_at == [0, 3]


async def test_a_call_that_is_cancelled_while_a_slow_disk_writes_keeps_its_last_step_after_all(
    replica: Callable[..., Sampler], written: list[Any], monkeypatch: pytest.MonkeyPatch
):
    put = FileStorePut()
    monkeypatch.setattr("deployments.files.file_store.FileStore.put_checkpoint", put.slow)
    stream = replica(Stage(slowly)).run(asked(), None, FIRST)
    for _ in range(1 + STEPS):
        await anext(stream)
    handing_on = asyncio.ensure_future(anext(stream))  # waits until the first step is written, then writes the latents
    await asyncio.sleep(0.1)
    handing_on.cancel()
    await asyncio.sleep(0.05)
    assert not handing_on.done()
    put.done.set()
    await asyncio.wait([handing_on])
    assert handing_on.cancelled()
    assert written == [1, STEPS]


async def test_a_call_that_is_cancelled_before_its_first_step_keeps_nothing(replica: Callable[..., Sampler], written: list[Any]):
    go_on = threading.Event()
    waiting = asyncio.ensure_future(listen(replica(Stage(lambda _: go_on.wait(5))), FIRST))
    await asyncio.sleep(0.05)
    waiting.cancel()
    await asyncio.wait([waiting], timeout=5)
    assert waiting.cancelled(), "though its unit still runs"
    go_on.set()
    assert written == []


async def test_a_task_that_is_cancelled_has_kept_its_last_step_when_it_ends(replica: Callable[..., Sampler], written: list[Any]):
    heard = asyncio.Event()
    loop = asyncio.get_running_loop()

    def tell(done: int) -> None:
        if done == 2:
            loop.call_soon_threadsafe(heard.set)

    task = asyncio.create_task(listen(replica(Stage(tell, held_at=4), checkpoint_s=LONG_S), FIRST))  # as Serve does
    await heard.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert written in ([2], [3], [4])


async def test_a_failed_call_keeps_no_step_more(replica: Callable[..., Sampler], written: list[Any]):
    def fail(done: int) -> None:
        if done == 3:
            raise GenerationFailed

    with pytest.raises(GenerationFailed):
        await listen(replica(Stage(fail), checkpoint_s=LONG_S), FIRST)
    assert written == []


async def test_a_first_attempt_looks_for_nothing(replica: Callable[..., Sampler], monkeypatch: pytest.MonkeyPatch):
    stage = Stage(held_at=3)
    one = replica(stage, checkpoint_s=LONG_S)
    await interrupt(one, f"step 3/{STEPS}")
    stage.held_at = None
    await listen(one, FIRST)
    assert stage.began_at == [0, 0]


@pytest.mark.parametrize(
    "found", [None, b"", b"\x80\x04pickle", "half", "of another request", "of other weights", "of another engine", "latents"]
)
async def test_what_is_not_this_jobs_own_work_starts_over(
    replica: Callable[..., Sampler], found: bytes | str | None, caplog: pytest.LogCaptureFixture
):
    stage = Stage()
    one = replica(stage)
    other = replica(stage, config=AnimateDiffConfig(dtype="float64"))
    files = one.checkpoints._files
    if isinstance(found, bytes):
        await files.put_checkpoint(NAME, "step", found)
    elif found == "latents":
        latents = Latents(torch.zeros(1, 4, 2, 2, 2), 1)
        await other.checkpoints.write(NAME, latents, lambda: other.checkpoints.of_latents(NAME))
    elif found is not None:
        writer = other if found == "of other weights" else one
        engines = "inductor" if found == "of another engine" else ""
        by = asked(seed=2 if found == "of another request" else 1)
        await writer.checkpoints.write(NAME, reached(3), lambda: writer.checkpoints.of_steps(NAME, by, engines))
        if found == "half":
            data = await files.get_checkpoint(NAME, "step")
            assert data is not None
            await files.put_checkpoint(NAME, "step", data[:-10])
    stage.began_at.clear()
    *_, done = await listen(one, AGAIN)
    assert stage.began_at == [0]
    assert isinstance(done.product, Latents)
    warned = [record for record in caplog.records if record.getMessage() == "checkpoint not used"]
    assert len(warned) == (found not in (None, "latents"))


@pytest.mark.parametrize(("before", "after"), [("inductor", "eager"), ("eager+inductor", "inductor"), ("inductor", "inductor")])
async def test_a_resume_by_another_engine_than_the_one_that_ran_the_steps_is_said(
    replica: Callable[..., Sampler], caplog: pytest.LogCaptureFixture, before: str, after: str
):
    """Both replicas have the same engines, but calls of one fell back to the modules."""
    await interrupt(replica(Stage(runs=before, held_at=3)), f"step 3/{STEPS}")
    stage = Stage(runs=after)
    *told, done = await listen(replica(stage), AGAIN)
    assert stage.began_at == [3], "the work is not lost"
    said = [item.message for item in told if isinstance(item, Note) and item.level == "WARN"]
    mixed = before != after
    assert done.product.engine == ("eager+inductor" if mixed else "inductor")
    assert said == mixed * ["steps were run by eager and inductor: the same request may give other bits another time"]
    assert [record.getMessage() for record in caplog.records] == said


@pytest.mark.parametrize("refuses", ["put_checkpoint", "get_checkpoint"])
async def test_a_file_store_that_is_away_costs_no_job(
    replica: Callable[..., Sampler], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, refuses: str
):
    class BucketAway(Exception):
        """Stands for the exceptions that each kind of store defines itself."""

    async def refuse(*_: Any) -> None:
        raise BucketAway

    monkeypatch.setattr(f"deployments.files.file_store.FileStore.{refuses}", refuse)
    *_, done = await listen(replica(Stage(slowly)), AGAIN)
    assert isinstance(done.product, Latents)
    assert {record.levelname for record in caplog.records} == {"WARNING"}


async def test_a_bucket_that_never_answers_holds_a_job_up_for_a_while_only(
    replica: Callable[..., Sampler], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("deployments.files.checkpoints.WRITE_TIMEOUT_S", 0.05)
    monkeypatch.setattr("deployments.files.file_store.FileStore.put_checkpoint", FileStorePut().slow)
    *_, done = await listen(replica(Stage()), FIRST)
    assert isinstance(done.product, Latents)


async def test_a_write_that_stalls_is_left_alone_and_replaces_no_finished_latents(
    replica: Callable[..., Sampler], written: list[Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("deployments.files.checkpoints.WRITE_TIMEOUT_S", 0.1)
    write, go_on, began = FileStore._write, threading.Event(), list[str]()

    def stalls_once(self: FileStore, path: str, data: bytes) -> None:
        began.append(Path(path).name)
        if len(began) == 1:
            assert go_on.wait(PATIENCE_S)
        write(self, path, data)

    monkeypatch.setattr(FileStore, "_write", stalls_once)
    *_, done = await listen(replica(Stage(slowly)), FIRST)
    assert isinstance(done.product, Latents)
    assert began == ["step.safetensors"], "nothing more is written beside it"

    monkeypatch.setattr("deployments.files.checkpoints.WRITE_TIMEOUT_S", PATIENCE_S)
    again = replica(Stage(), checkpoint_s=LONG_S)  # another replica, for another attempt
    await listen(again, FIRST)
    assert written == ["latents"]
    go_on.set()
    async with asyncio.timeout(PATIENCE_S):
        while written != ["latents", 1]:  # noqa: ASYNC110  (the stalled call has long ended and tells nobody)
            await asyncio.sleep(0.01)
    assert await again.checkpoints.latents(NAME) is not None


async def test_finished_latents_are_found_without_the_conditioning(
    replica: Callable[..., Sampler], monkeypatch: pytest.MonkeyPatch, url: str
):
    def preprocess(config: Any) -> Preprocess:
        monkeypatch.setattr("deployments.stages.preprocess.build_stage", lambda *_: None)
        return Preprocess(ENDPOINTS[ENDPOINT], config, FetchSettings(), url)

    async def saved(config: Any = CONFIG, name: str = NAME) -> list[Any]:
        return [item async for item in preprocess(config).saved(CheckpointRef(name, used=True))]

    assert await saved() == [Started(), Done(None, 0.0)]
    one = replica(Stage(slowly), checkpoint_s=LONG_S)
    await interrupt(one, f"step 3/{STEPS}")
    assert await saved() == [Started(), Done(None, 0.0)], "a step's checkpoint holds no finished latents"
    *_, done = await listen(one, AGAIN)
    turn, note, found = await saved()
    assert (turn, note, found.seconds) == (Started(), Note("resumed after the last step"), 0.0)
    assert torch.equal(found.product.values, done.product.values)
    assert await saved(AnimateDiffConfig(dtype="float64")) == [Started(), Done(None, 0.0)], "the latents belong to another model"
    data = await one.checkpoints._files.get_checkpoint(NAME, "latents")
    assert data is not None
    another = NAME[:-1] + "2"
    await one.checkpoints._files.put_checkpoint(another, "latents", data)
    assert await saved(name=another) == [Started(), Done(None, 0.0)], "the latents belong to another job"
