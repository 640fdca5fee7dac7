import json
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from deployments.batch.manifest import ManifestFailed
from deployments.batch.prepare import OtherManifest, RowsRefused
from deployments.batch.progress import Snapshot, read_progress
from deployments.batch.records import Ended, Record, publish, write_record, write_results
from deployments.batch.run_folder import NoRun, RunFolder
from deployments.settings import Settings
from engines.errors import ImageLoadError, RunnerFailed
from engines.spec import Clip
from tests.bucket import bucket, s3_server
from tests.deployments.batch.runs import manifest_of, prepared


@pytest.fixture(params=["folder", "bucket"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunFolder]:
    if request.param == "folder":
        yield RunFolder(str(tmp_path / "out"))
        return
    with s3_server() as url, bucket(url, monkeypatch) as place:
        yield RunFolder(f"{place}/run")


def test_a_run_goes_on_from_its_folder_alone(folder: RunFolder, tmp_path: Path):
    """Seeds that were drawn stay, what is done is left alone, and the row at fault is not rendered again."""
    settings = Settings()
    rows = [{"id": name, "prompt": name} for name in "abcd"]
    manifest = manifest_of(tmp_path / "rows.jsonl", rows)
    first = prepared(folder, manifest, settings)
    assert (first.run.rows, first.resumed) == (4, False)
    a, b, c, d = folder.rows()
    publish(folder, a, Clip(b"an mp4", 16, 64, 64, 8, a.input["seed"]), {"denoise": 2.0}, {"engine": "eager"})
    write_record(folder, b, Record.of_error(b, ImageLoadError()))
    write_record(folder, c, Record.of_error(c, RunnerFailed()))
    write_record(folder, d, Record(d.id, d.number, "done"))  # killed before its video was there

    again = prepared(folder, manifest, settings)
    assert again.resumed
    assert list(folder.rows()) == [a, b, c, d]
    ended = Ended(folder)
    assert [ended.status(row) for row in (a, b, c, d)] == ["done", "refused", None, None]
    write_results(folder, tmp_path)
    lines = [json.loads(line) for line in (folder.read("results.jsonl") or b"").splitlines()]
    assert [(line["id"], line["status"], line["error_type"]) for line in lines] == [
        ("a", "done", None),
        ("b", "refused", "image_load_error"),
        ("c", "failed", "runner_server_error"),
    ]
    assert lines[0]["url"] == f"{folder.url}/videos/a.mp4"
    (tmp_path / "table").write_bytes(folder.read("results.parquet") or b"")
    table = pq.read_table(tmp_path / "table").to_pylist()
    assert (table[0]["seed"], table[0]["denoise_s"]) == (a.input["seed"], 2.0)
    ended.clear(c)
    assert Ended(folder).status(c) is None
    assert len(folder.names("records")) == 3


def test_another_manifest_is_refused_unless_it_is_meant(folder: RunFolder, tmp_path: Path):
    """Then what differs is rendered, and what does not keeps its seed and its video."""
    settings = Settings()
    rows = [{"id": name, "prompt": name} for name in "ab"]
    manifest = manifest_of(tmp_path / "rows.jsonl", rows)
    prepared(folder, manifest, settings)
    a, b = folder.rows()
    for row in (a, b):
        publish(folder, row, Clip(b"an mp4", 16, 64, 64, 8, 1), {}, {})
    manifest_of(tmp_path / "rows.jsonl", [rows[0], {"id": "b", "prompt": "changed"}])
    with pytest.raises(OtherManifest, match="2 rows of another manifest"):
        prepared(folder, manifest, settings)
    assert list(folder.rows()) == [a, b]
    prepared(folder, manifest, settings, changed=True)
    ended = Ended(folder)
    same, other = folder.rows()
    assert same == a
    assert [ended.status(same), ended.status(other)] == ["done", None]
    ended.clear(other)
    assert folder.names("videos") == {"a.mp4"}


def test_nothing_is_begun_if_a_row_is_invalid(tmp_path: Path):
    folder = RunFolder(str(tmp_path / "out"))
    rows = [{"prompt": "x", "keyframe_0_image_url": "a.png", "keyframe_0_index": 0}, {"prompt": "x", "seed": "no"}]
    (tmp_path / "a.png").write_bytes(b"a picture")
    manifest = manifest_of(tmp_path / "rows.jsonl", rows)
    with pytest.raises(RowsRefused) as refused:
        prepared(folder, manifest, Settings())
    assert [problem.number for problem in refused.value.problems] == [2]
    assert not Path(folder.url).exists()
    with pytest.raises(NoRun, match=r"it has no run\.json"):
        folder.run()
    assert prepared(folder, manifest, Settings(), skip_invalid=True).run.rows == 1
    (row,) = folder.rows()
    assert folder.read(row.input["keyframe_0_image_url"].removeprefix("kept:")) == b"a picture"


def test_a_manifest_without_rows_is_no_run(tmp_path: Path):
    with pytest.raises(ManifestFailed, match="has no rows"):
        prepared(RunFolder(str(tmp_path / "out")), manifest_of(tmp_path / "rows.jsonl", []), Settings())


def test_a_run_keeps_none_of_the_services_secrets(tmp_path: Path):
    folder = RunFolder(str(tmp_path / "out"))
    settings = Settings(database="postgresql://me:secret@db/jobs")
    prepared(folder, manifest_of(tmp_path / "rows.jsonl", [{"prompt": "x"}]), settings)
    assert b"secret" not in (folder.read("run.json") or b"")
    assert folder.run().loaded_settings().animatediff == settings.animatediff


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"pid": os.getpid()}, "5 of 10 done, 1 failed, 3.0 a minute, about 0:01:20 left"),
        ({"pid": 2**22 + 1}, "5 of 10 done, 1 failed, its driver has died"),
        ({"host": "another"}, "5 of 10 done, 1 failed, its driver has died"),
        ({"state": "broken", "error": "no room"}, "5 of 10 done, 1 failed, broken: no room"),
    ],
)
def test_progress_is_read_anywhere(fields: dict[str, object], line: str, tmp_path: Path):
    """A driver of another machine that has not written for a minute has died."""
    import socket

    folder = RunFolder(str(tmp_path))
    written = {"total": 10, "done": 5, "failed": 1, "earlier": 4, "begun_at": 1000.0, "updated_at": 1040.0}
    folder.write("progress.json", json.dumps(written | {"host": socket.gethostname()} | fields).encode())
    now = read_progress(folder, "progress.json")
    assert isinstance(now, Snapshot)
    assert now.line() == line
