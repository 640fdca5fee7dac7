import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from deployments.batch.run_folder import RunFolder
from tests.deployments.batch.runs import SMALL, manifest_of
from tests.e2e.service import ENVIRONMENT, REELRAY
from tests.patience import PATIENCE_S


def config_of(home: Path, demo_weights: Path) -> Path:
    """A YAML for the command, whose home has the demo weights."""
    (home / "weights").symlink_to(demo_weights)
    document = yaml.safe_load(Path("serve_config.yaml").read_text())
    document["applications"][0]["args"]["home"] = str(home)
    path = home / "serve_config.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def started(command: list[Any], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen([REELRAY, "batch", *command], stdout=file, stderr=file, env=os.environ | ENVIRONMENT)


def test_a_run_that_is_killed_goes_on_and_does_no_row_twice(demo_weights: Path, tmp_path: Path):
    """On an embedded Ray, with the rows at fault among the others."""
    rows: list[dict[str, Any]] = [{"id": f"clip-{n}", "prompt": f"a ball {n}", **SMALL} for n in range(6)]
    for n in (1, 4):
        (tmp_path / f"bad-{n}.png").write_bytes(b"no picture")
        rows[n] |= {"keyframe_0_image_url": f"bad-{n}.png", "keyframe_0_index": 0}
    home, out, log = tmp_path / "home", tmp_path / "out", tmp_path / "log"
    home.mkdir()
    command: list[Any] = ["submit", manifest_of(tmp_path / "rows.jsonl", rows), "--endpoint", "animatediff-sparsectrl-lcm"]
    command += ["--out", out, "--max-failures", 2, "--config", config_of(home, demo_weights)]
    command = list(map(str, command))
    folder = RunFolder(str(out))

    first = started(command, log)
    deadline = time.monotonic() + PATIENCE_S
    while len(folder.names("videos")) < 2:
        assert first.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    below = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGKILL)
    first.wait(PATIENCE_S)
    _, alive = psutil.wait_procs(below, PATIENCE_S)
    assert not alive  # else two drivers would render the same rows
    before = {path.name: path.stat().st_mtime_ns for path in (out / "videos").iterdir()}
    assert subprocess.run([REELRAY, "batch", "status", out], capture_output=True, text=True, check=True).stdout.endswith(
        "its driver has died\n"
    )

    assert started(command, log).wait(PATIENCE_S) == 0, log.read_text()
    after = {path.name: path.stat().st_mtime_ns for path in (out / "videos").iterdir()}
    assert after.keys() == {f"clip-{n}.mp4" for n in (0, 2, 3, 5)}
    assert {name: after[name] for name in before} == before
    results = [json.loads(line) for line in (folder.read("results.jsonl") or b"").splitlines()]
    assert [(row["id"], row["status"]) for row in results] == [
        (f"clip-{n}", "refused" if n in (1, 4) else "done") for n in range(6)
    ]
    assert "row 2 (clip-1) refused: keyframe_0_image_url:" in log.read_text()
    assert subprocess.run([sys.executable, "-m", "deployments.batch", out], capture_output=True, check=False).returncode == 0
