from pathlib import Path

import pytest

from deployments.batch import laps
from deployments.batch.run_folder import Row, RunFolder


async def test_rows_that_die_with_an_actor_are_tried_again_alone_and_the_one_that_kills_it_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if a lap has lost all of its rows."""
    monkeypatch.setattr(laps, "LAP", "tests.deployments.batch.lossy_lap")
    rows = [Row(name, number, "digest", {"seed": 1}) for number, name in enumerate(("innocent", "poison"), 1)]
    records = [record async for record in laps.in_laps(RunFolder(str(tmp_path)), iter(rows))]
    assert [(each.id, each.status, each.error_type) for each in records] == [
        ("innocent", "done", None),
        ("poison", "failed", "runner_disconnected"),
    ]


async def test_a_lap_that_cannot_begin_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laps, "LAP", "tests.no_such_module")
    with pytest.raises(laps.LapFailed, match="no_such_module"):
        [record async for record in laps.in_laps(RunFolder(str(tmp_path)), iter([Row("a", 1, "digest", {"seed": 1})]))]
