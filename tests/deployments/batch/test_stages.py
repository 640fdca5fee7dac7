from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from deployments.batch.contact_sheet import write_contact_sheet
from deployments.batch.records import Ended, Record, video_of
from deployments.batch.run_folder import Row, RunFolder
from deployments.batch.stages import STAGES, Decode, RowStage, Work
from deployments.settings import Settings
from engines.errors import RunnerOutOfMemory, StorageFailed
from engines.pipeline import Pipeline
from tests.deployments.batch.runs import CLIP, SMALL, manifest_of, prepared


@pytest.fixture(scope="module")
def folder(demo_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of three rows, of which the second names a file that is no picture."""
    place = tmp_path_factory.mktemp("batch")
    buffer = BytesIO()
    Image.new("RGB", (64, 64), "white").save(buffer, "PNG")
    (place / "good.png").write_bytes(buffer.getvalue())
    (place / "bad.png").write_bytes(b"no picture")
    rows = [
        {"id": name, "prompt": "a ball", "keyframe_0_image_url": f"{name}.png", "keyframe_0_index": 0, **SMALL}
        for name in ("good", "bad")
    ]
    made = RunFolder(str(place / "out"))
    manifest = manifest_of(place / "rows.jsonl", [*rows, {"id": "last", "prompt": "a cube", **SMALL}])
    prepared(made, manifest, demo_settings, {"contact_sheet": True})
    return made


@pytest.fixture(scope="module")
def stages(folder: RunFolder) -> list[RowStage]:
    return [stage(folder.url) for stage in STAGES]


def rendered(stages: list[RowStage], row: Row) -> Record:
    work = Work(row)
    for stage in stages:
        work = stage(work)
    assert work.record is not None
    assert work.product is None
    return work.record


def test_a_row_at_fault_ends_alone_and_the_others_are_the_pipelines_bytes(
    folder: RunFolder, stages: list[RowStage], demo_settings: Settings, tmp_path: Path
):
    good, bad, last = (rendered(stages, row) for row in folder.rows())
    assert (bad.status, bad.error_type, bad.url) == ("refused", "unsupported_image_format", None)
    assert "keyframe_0_image_url" in (bad.error or "")
    pipeline = Pipeline(CLIP.model, demo_settings.model_configs()[CLIP.model])
    row = list(folder.rows())[2]
    spec = CLIP.input.stored(row.input).spec({})
    assert folder.read(video_of("last")) == pipeline.render(spec).mp4
    assert last.receipt.keys() == {"engine", "seconds", "gpu_seconds", "weights", "options"}
    assert good.seconds.keys() == {"preprocess", "denoise", "decode"}
    ended = Ended(folder)
    assert [ended.status(row) for row in folder.rows()] == ["done", "refused", "done"]
    write_contact_sheet(folder)
    sheet = Image.open(BytesIO(folder.read("contact_sheet.jpg") or b""))
    assert sheet.size == (2 * 192, 192 + 12)


@contextmanager
def failing(stage: RowStage, monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> Iterator[list[int]]:
    """Raises the errors, one an attempt, and then works."""
    left, tries, work = list(errors), [0], stage.work

    def fails(given: Work) -> Work:
        tries[0] += 1
        if left:
            raise left.pop(0)
        return work(given)

    with monkeypatch.context() as patched:
        patched.setattr(stage, "work", fails)
        patched.setattr("deployments.batch.stages.time.sleep", lambda _: None)
        yield tries


@pytest.mark.parametrize(
    ("errors", "status", "attempts"),
    [
        ((StorageFailed(), StorageFailed(), RunnerOutOfMemory()), "done", 4),
        ((RunnerOutOfMemory(), RunnerOutOfMemory()), "failed", 2),
        ((ZeroDivisionError(),), "failed", 1),
    ],
)
def test_errors_are_tried_again_as_in_the_service(
    errors: tuple[Exception, ...],
    status: str,
    attempts: int,
    folder: RunFolder,
    stages: list[RowStage],
    monkeypatch: pytest.MonkeyPatch,
):
    row = list(folder.rows())[2]
    Ended(folder).clear(row)
    decode = stages[2]
    assert isinstance(decode, Decode)
    with failing(decode, monkeypatch, *errors) as tries:
        assert rendered(stages, row).status == status
    assert tries == [attempts]
