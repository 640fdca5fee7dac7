"""`reelray batch` as a user calls it: once on Ray, and killed and given again, without it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from deployments.batch.run_folder import RunFolder
from tests.deployments.batch.runs import SMALL, manifest_of
from tests.e2e.service import ENVIRONMENT, REELRAY
from tests.patience import PATIENCE_S

WITHOUT_RAY = (
    "from deployments.batch import laps; laps.LAP = 'tests.deployments.batch.plain_lap';"
    "from deployments.cli.main import app; app(prog_name='reelray')"
)


def command_for(place: Path, demo_weights: Path, rows: list[dict[str, Any]]) -> list[str]:
    """What to give `reelray batch`. The run is in the folder `out`."""
    home = place / "home"
    home.mkdir()
    (home / "weights").symlink_to(demo_weights)
    document = yaml.safe_load(Path("serve_config.yaml").read_text())
    document["applications"][0]["args"] |= {"home": str(home), "animatediff": {"weights": "demo", "device": "cpu", "threads": 1}}
    config = place / "serve_config.yaml"
    config.write_text(yaml.safe_dump(document))
    (place / "bad.png").write_bytes(b"no picture")
    manifest = manifest_of(place / "rows.jsonl", rows)
    return ["submit", manifest, "--endpoint", "animatediff-sparsectrl-lcm", "--out", f"{place}/out", "--config", str(config)]


def rows_of(count: int, *bad: int) -> list[dict[str, Any]]:
    """bad: those that name a file which is no picture."""
    rows: list[dict[str, Any]] = [{"id": f"clip-{n}", "prompt": f"a ball {n}", **SMALL} for n in range(count)]
    for n in bad:
        rows[n] |= {"keyframe_0_image_url": "bad.png", "keyframe_0_index": 0}
    return rows


def stamps(out: Path) -> dict[str, int]:
    """Video -> when it was written."""
    return {path.name: path.stat().st_mtime_ns for path in (out / "videos").glob("*.mp4")}


@pytest.mark.timeout(400)
def test_ray_data_streams_the_rows_and_a_row_at_fault_ends_alone(demo_weights: Path, tmp_path: Path):
    command = [str(REELRAY), "batch", *command_for(tmp_path, demo_weights, rows_of(3, 1)), "--contact-sheet"]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr  # more failed than --max-failures
    assert "row 2 (clip-1) refused: keyframe_0_image_url:" in done.stderr
    out = tmp_path / "out"
    assert stamps(out).keys() == {"clip-0.mp4", "clip-2.mp4"}
    assert (out / "contact_sheet.jpg").is_file()
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [(row["id"], row["status"]) for row in results] == [("clip-0", "done"), ("clip-1", "refused"), ("clip-2", "done")]


@pytest.mark.timeout(400)
def test_a_run_that_is_killed_goes_on_and_does_no_row_twice(demo_weights: Path, tmp_path: Path):
    command = [sys.executable, "-c", WITHOUT_RAY, "batch", *command_for(tmp_path, demo_weights, rows_of(5, 1))]
    out, log = tmp_path / "out", tmp_path / "log"

    def started() -> subprocess.Popen[bytes]:
        with log.open("ab") as file:
            return subprocess.Popen([*command, "--max-failures", "1"], stdout=file, stderr=file)

    first = started()
    deadline = time.monotonic() + PATIENCE_S
    while len(stamps(out)) < 2:
        assert first.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    below = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGKILL)
    first.wait(PATIENCE_S)
    _, alive = psutil.wait_procs(below, PATIENCE_S)
    assert not alive  # else two would render the same rows
    before = stamps(out)
    told = subprocess.run([REELRAY, "batch", "status", out], capture_output=True, text=True, check=True).stdout
    assert told.endswith("its driver has died\n")

    assert started().wait(PATIENCE_S) == 0, log.read_text()
    after = stamps(out)
    assert after.keys() == {f"clip-{n}.mp4" for n in (0, 2, 3, 4)}
    assert {name: after[name] for name in before} == before
    assert len(RunFolder(str(out)).names("records")) == 5
