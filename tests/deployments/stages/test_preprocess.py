import asyncio
import tempfile
import threading
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.files.file_store import FileStore
from deployments.schemas.endpoint import ENDPOINTS
from deployments.schemas.inputs import KEPT
from deployments.settings import FetchSettings, Settings
from deployments.stages.preprocess import Preprocess
from deployments.stages.progress import StageProgress
from deployments.stages.protocol import Done, Note, Started, Stream
from engines.config import ModelConfig
from engines.errors import Cancelled, FileDownloadError, ImageLoadError, StorageFailed
from engines.spec import Progress
from engines.temporary import PREFIX
from tests.fakes import ENDPOINT, EndlessStage, LocalStages
from tests.patience import PATIENCE_S

INPUT = {"prompt": "a", "seed": 1, "keyframe_0_image_url": "data:;base64,aGk=", "keyframe_0_index": 0}


class Conditioned:
    notes = ("the prompt was cut",)


class Looking:
    """Notes the keyframes that it is given."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []

    def encode(self, spec: Any, *, on_progress: Any, should_stop: Any) -> Conditioned:
        self.seen.extend(keyframe.image for keyframe in spec.keyframes)
        return Conditioned()


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which downloads are stored."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def replica(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Any], Preprocess]:
    """A replica around a stage."""

    def build(stage: Any) -> Preprocess:
        monkeypatch.setattr("deployments.stages.preprocess.build_stage", lambda *_: stage)
        return Preprocess(ENDPOINTS[ENDPOINT], ModelConfig(), FetchSettings(), str(tmp_path / "files"))

    return build


def downloads(temporary: Path) -> list[bytes]:
    return [path.read_bytes() for path in temporary.glob("*/*")]


def left(temporary: Path) -> list[Path]:
    return list(temporary.iterdir())


async def listen(stream: Stream[Any]) -> list[Any]:
    return [item async for item in stream]


async def test_a_job_that_waited_while_the_schema_changed_is_not_refused(replica: Callable[[Any], Preprocess], temporary: Path):
    specs: list[Any] = []

    class Stage:
        def encode(self, spec: Any, *, on_progress: Any, should_stop: Any) -> Conditioned:
            specs.append(spec)
            return Conditioned()

    stored = {"prompt": "a", "seed": 1, "num_inference_steps": 99, "a_field_of_yesterday": True}
    *_, done = await listen(replica(Stage()).run(stored))
    assert isinstance(done, Done)
    assert (specs[0].seed, specs[0].guidance_scale) == (1, 1)


async def test_a_job_that_may_kill_the_replica_works_alone_in_it(replica: Callable[[Any], Preprocess], temporary: Path):
    began: list[int] = []
    go_on = threading.Semaphore(0)

    class Stage:
        def encode(self, spec: Any, *, on_progress: Any, should_stop: Any) -> Conditioned:
            began.append(spec.seed)
            assert go_on.acquire(timeout=PATIENCE_S)
            return Conditioned()

    one = replica(Stage())

    async def until(*seeds: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while set(began) != set(seeds):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert set(began) == set(seeds)

    calls = [(1, False), (2, False), (3, True), (4, False), (5, False)]
    async with asyncio.TaskGroup() as group:
        for seed, alone in calls:
            group.create_task(listen(one.run({"prompt": "a", "seed": seed}, alone)))
            await asyncio.sleep(0)
        await until(1, 2)
        go_on.release()
        await until(1, 2)
        go_on.release()
        await until(1, 2, 3)
        go_on.release()
        await until(1, 2, 3, 4, 5)
        go_on.release(2)


async def test_the_files_live_until_the_stage_has_ended(replica: Callable[[Any], Preprocess], temporary: Path):
    seen: list[bytes] = []

    class Stage:
        def encode(self, spec: Any, *, on_progress: Any, should_stop: Any) -> Conditioned:
            on_progress(Progress("pose", 1, 1))
            seen.extend(downloads(temporary))
            return Conditioned()

    begun, *notes, done = await listen(replica(Stage()).run(INPUT))
    assert begun == Started()
    progress = StageProgress("preprocess", Progress("pose", 1, 1))
    assert notes == [Note("preprocess: pose 1/1", progress=progress), Note("the prompt was cut", "WARN")]
    assert isinstance(done, Done)
    assert isinstance(done.product, Conditioned)
    assert seen == [b"hi"]
    assert left(temporary) == []


async def test_a_file_that_the_door_has_stored_is_read_from_there(
    replica: Callable[[Any], Preprocess], temporary: Path, tmp_path: Path
):
    stage = Looking()
    store = FileStore(str(tmp_path / "files"))
    name = store.new_input()
    with pytest.raises(StorageFailed):
        await listen(replica(stage).run(INPUT | {"keyframe_0_image_url": KEPT + name}))
    await store.put_input(name, b"stored")
    both = {"keyframe_0_image_url": KEPT + name, "keyframe_1_image_url": "data:;base64,aGk=", "keyframe_1_index": 8}
    await listen(replica(stage).run(INPUT | both))
    assert stage.seen == [b"stored", b"hi"]


async def test_a_file_of_ours_is_read_from_the_store_and_one_whose_time_is_over_is_the_callers_fault(
    replica: Callable[[Any], Preprocess], tmp_path: Path
):
    stage = Looking()
    store = FileStore(str(tmp_path / "files"))
    name = store.new_listed_name("a.png", "image/png")
    await store.put("a.png", b"uploaded", "image/png", name)
    await listen(replica(stage).run(INPUT | {"keyframe_0_image_url": KEPT + name}))
    assert stage.seen == [b"uploaded"]
    await store.delete(name)
    with pytest.raises(FileDownloadError) as raised:
        await listen(replica(stage).run(INPUT | {"keyframe_0_image_url": KEPT + name}))
    assert raised.value.loc == ("body", "keyframe_0_image_url")


@pytest.mark.parametrize("how", ["cancelled", "closed"])
async def test_a_call_that_ends_early_stops_its_stage_and_leaves_no_files(
    replica: Callable[[Any], Preprocess], temporary: Path, how: str
):
    stage = EndlessStage()
    stream = replica(stage).run(INPUT)
    assert await anext(stream) == Started()
    assert (await anext(stream)).message == "preprocess: frame 1/1000000"
    assert stage.running
    assert downloads(temporary) == [b"hi"]
    if how == "cancelled":
        listening = asyncio.create_task(listen(stream))
        await asyncio.sleep(0)
        listening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await listening
    else:
        await stream.aclose()
    assert not stage.running
    assert left(temporary) == []


@pytest.mark.parametrize(("url", "error"), [("data:,", FileDownloadError), ("data:;base64,aGk=", ImageLoadError)])
async def test_a_call_that_fails_leaves_no_files(
    replica: Callable[[Any], Preprocess], temporary: Path, url: str, error: type[Exception]
):
    class Stage:
        def encode(self, spec: Any, *, on_progress: Any, should_stop: Any) -> Conditioned:
            raise ImageLoadError

    with pytest.raises(error):
        await listen(replica(Stage()).run(INPUT | {"keyframe_0_image_url": url}))
    assert left(temporary) == []


async def test_what_a_killed_replica_has_left_is_deleted_by_the_next(replica: Callable[[Any], Preprocess], temporary: Path):
    folder = temporary / f"{PREFIX}0"
    folder.mkdir()
    (folder / "video_url").write_bytes(b"a long video")
    replica(None)
    assert left(temporary) == []


async def test_several_calls_are_worked_on_at_once(replica: Callable[[Any], Preprocess]):
    stage = EndlessStage()
    wrapper = replica(stage)
    async with aclosing(wrapper.run(INPUT)) as one, aclosing(wrapper.run(INPUT)) as other:
        for stream in (one, other):
            assert await anext(stream) == Started()
            await anext(stream)
        assert stage.running == 2


def test_animatediff_stops_before_its_next_prompt(demo_settings: Settings):
    replica = LocalStages(demo_settings).preprocess_replica
    spec = replica.endpoint.input.model_validate(INPUT | {"guidance_scale": 2}).spec({"keyframe_0_image_url": Path(__file__)})
    calls: list[int] = []
    encoder = replica.stage.text_encoder  # type: ignore[attr-defined]
    encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    for stop_after in (0, 1, 2):
        calls.clear()
        with pytest.raises(Cancelled):
            replica.stage.encode(spec, should_stop=lambda after=stop_after: len(calls) == after)
        assert len(calls) == stop_after


def test_animatediff_stops_before_its_next_keyframe(demo_settings: Settings, monkeypatch: pytest.MonkeyPatch):
    replica = LocalStages(demo_settings).preprocess_replica
    loaded: list[Any] = []
    monkeypatch.setattr(
        "engines.animatediff.preprocess.load_scribble", lambda *given: loaded.append(given) or torch.zeros(3, 64, 64)
    )
    job = INPUT | {"keyframe_1_image_url": "data:;base64,aGk=", "keyframe_1_index": 8}
    files = dict.fromkeys(("keyframe_0_image_url", "keyframe_1_image_url"), Path(__file__))
    spec = replica.endpoint.input.model_validate(job).spec(files)
    with pytest.raises(Cancelled):
        replica.stage.encode(spec, should_stop=lambda: len(loaded) == 1)
    assert len(loaded) == 1
