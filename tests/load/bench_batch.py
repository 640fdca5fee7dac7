"""What batch rendering promises, on this machine's embedded Ray and the demo weights:

    python -m tests.load.bench_batch [drill] [throughput] [memory] [cluster] [--rows 200] [--save]

drill: rows of both endpoints, ten of them at fault; the driver is killed in the middle and its command given again. What is lost
and what is done twice is counted. throughput: rows a second, against three in-process pipelines on the same cores. memory: of the
driver, for so many rows that do nothing and for a hundred times as many. cluster: rows as a Ray job, stopped and resumed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import yaml
from rich.console import Console

from deployments.batch import laps
from deployments.batch.driver import Shard, run_and_exit
from deployments.batch.run_folder import RunFolder
from deployments.hosting.demo_weights import write_demo
from tests.deployments.batch.runs import manifest_of
from tests.e2e.service import free_port
from tests.load.report import Report
from tests.load.report import table as empty_table

REELRAY = Path(sys.executable).with_name("reelray")
POISONED = 5
"""Rows of each endpoint that name a file which is no picture."""
CLIP, VIDEO = "animatediff-sparsectrl-lcm", "controlnext"
SMALL = {CLIP: {"num_inference_steps": 1}, VIDEO: {"num_inference_steps": 1, "max_frame_num": 9}}


class Place:
    """A home with demo weights and inputs, and the manifests in it."""

    def __init__(self, folder: Path):
        self.folder = folder
        write_demo(folder / "demo")
        (folder / "home" / "weights").mkdir(parents=True)
        (folder / "home" / "weights" / "demo").symlink_to(folder / "demo")
        document = yaml.safe_load(Path("serve_config.yaml").read_text())
        document["applications"][0]["args"]["home"] = str(folder / "home")
        self.config = folder / "serve_config.yaml"
        self.config.write_text(yaml.safe_dump(document))
        (folder / "demo" / "bad.png").write_bytes(b"no picture")

    def manifest(self, model: str, count: int, poisoned: int = 0) -> str:
        given = json.loads((self.folder / "demo" / f"{model}.json").read_text()) | SMALL[model]
        bad = {"image_url": "bad.png"} if model == VIDEO else {"keyframe_0_image_url": "bad.png"}
        step = count // poisoned if poisoned else count + 1
        rows = [given | {"id": f"{n:04}", "seed": n} | (bad if n % step == step - 1 else {}) for n in range(count)]
        return manifest_of(self.folder / "demo" / f"{model}-{count}.jsonl", rows)

    def command(self, model: str, count: int, out: Path, *options: Any, poisoned: int = 0) -> list[str]:
        submit = [REELRAY, "batch", "submit", self.manifest(model, count, poisoned), "--endpoint", model, "--out", out]
        return list(map(str, [*submit, "--config", self.config, "--max-failures", poisoned, *options]))


def table(title: str, head: list[str], rows: list[list[Any]]) -> Any:
    made = empty_table(title, *head)
    for row in rows:
        made.add_row(*map(str, row))
    return made


def stamps(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (out / "videos").glob("*.mp4")}


def wait_for(out: Path, count: int, process: subprocess.Popen[bytes]) -> dict[str, int]:
    while len(done := stamps(out)) < count:
        assert process.poll() is None, "it ended too soon"
        time.sleep(0.05)
    return done


def drill(place: Place, rows: int, report: Report) -> None:
    """See above."""
    lines = []
    for model in (CLIP, VIDEO):
        out, count = place.folder / f"out-{model}", rows // 2
        command = place.command(model, count, out, "--contact-sheet", poisoned=POISONED)
        began = time.monotonic()
        first = subprocess.Popen(command)
        wait_for(out, count // 2, first)
        below = psutil.Process(first.pid).children(recursive=True)
        first.send_signal(signal.SIGKILL)
        first.wait()
        psutil.wait_procs(below, 120)
        before = stamps(out)
        status = subprocess.run(command, check=False).returncode
        after = stamps(out)
        results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
        refused = sum(row["status"] == "refused" for row in results)
        twice = sum(after[name] != stamp for name, stamp in before.items())
        missing = count - len(after) - refused
        lines.append(
            [model, count, len(before), len(after), refused, twice, missing, status, f"{time.monotonic() - began:.0f} s"]
        )
    head = ["endpoint", "rows", "done at the kill", "done", "refused", "done twice", "missing", "exit status", "in all"]
    report.add(table("Killed in the middle and given again", head, lines))


def throughput(place: Place, rows: int, report: Report) -> None:
    """Both sides render the same rows, one side after the other. The start of Ray and the loading of models do not count."""
    out = place.folder / "out-throughput"
    process = subprocess.Popen(place.command(CLIP, rows, out))
    wait_for(out, rows, process)
    process.wait()
    done = sorted(stamps(out).values())
    batch = (len(done) - 1) / ((done[-1] - done[0]) / 1e9)
    pipelines = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.load.bench_batch", "pipeline", place.manifest(CLIP, rows), str(place.config), f"{n}/3"],
            stdout=subprocess.PIPE,
        )
        for n in range(3)
    ]
    spans = [json.loads(each.communicate()[0].splitlines()[-1]) for each in pipelines]
    alone = sum(span["rows"] for span in spans) / (max(span["end"] for span in spans) - min(span["begin"] for span in spans))
    head = ["rows", "batch, a second", "three pipelines, a second", "ratio", "target"]
    report.add(table("Throughput", head, [[rows, f"{batch:.2f}", f"{alone:.2f}", f"{batch / alone:.2f}", ">= 0.95"]]))


def pipeline(manifest: str, config: str, part: str) -> None:
    """A process with a pipeline of its own: every third row."""
    from deployments.schemas.endpoint import ENDPOINTS
    from deployments.settings import load_settings
    from engines.pipeline import Pipeline

    index, count = map(int, part.split("/"))
    endpoint = ENDPOINTS[f"fal-ai/{CLIP}"]
    made = Pipeline(endpoint.model, load_settings(Path(config)).model_configs()[endpoint.model])
    rows = [json.loads(line) for line in Path(manifest).read_text().splitlines()][index::count]
    files = {name: Path(manifest).parent / value for name, value in rows[0].items() if name.endswith("_url")}
    fields = dict.fromkeys(files, "https://a.file")

    def render(row: dict[str, Any]) -> None:
        given = {name: value for name, value in row.items() if name != "id"} | fields
        made.render(endpoint.input.parse(json.dumps(given).encode()).input.resolved().spec(files))

    render(rows[0])
    begin = time.time()
    for row in rows:
        render(row)
    sys.stdout.write(json.dumps({"rows": len(rows), "begin": begin, "end": time.time()}))


def memory(place: Place, counts: tuple[int, ...], report: Report) -> None:
    """The driver's own process, whose laps' processes come and go."""
    lines = []
    for count in counts:
        out = place.folder / f"out-memory-{count}"
        subprocess.run([*place.command(CLIP, count, out), "--prepare-only"], check=True)
        process = subprocess.Popen([sys.executable, "-m", "tests.load.bench_batch", "nothing", str(out)])
        peak = {"driver": 0, "lap": 0}
        began = time.monotonic()
        while process.poll() is None:
            driver = psutil.Process(process.pid)
            for kind, found in (("driver", [driver]), ("lap", driver.children())):
                peak[kind] = max(peak[kind], *(each.memory_info().rss >> 20 for each in found), 0)
            time.sleep(0.5)
        lines.append(
            [f"{count:,}", f"{peak['driver']} MB", f"{peak['lap']} MB", f"{time.monotonic() - began:.0f} s", process.returncode]
        )
    report.add(table("Memory: rows that do nothing", ["rows", "driver", "a lap's process", "in all", "exit status"], lines))


def nothing(out: str) -> None:
    """A driver whose laps render nothing."""
    laps.LAP = "tests.load.nothing_lap"
    sys.exit(run_and_exit(RunFolder(out), Shard(), Console(stderr=True)))


def cluster(place: Place, rows: int, report: Report) -> None:
    """A head of its own with a dashboard on a free port."""
    out, port = place.folder / "out-cluster", free_port()
    environment = os.environ | {
        "RAY_AUTH_MODE": "disabled",
        "PATH": f"{REELRAY.parent}:{os.environ['PATH']}",
        "RAY_TMPDIR": str(place.folder / "ray"),
    }
    ray = [str(REELRAY.with_name("ray"))]
    start = ["start", "--head", "--port=0", "--include-dashboard=true", f"--dashboard-port={port}", "--disable-usage-stats"]
    subprocess.run([*ray, *start, f"--dashboard-agent-listen-port={free_port()}"], check=True, env=environment)
    try:
        address = f"http://127.0.0.1:{port}"
        command = [*place.command(CLIP, rows, out, poisoned=POISONED), "--address", address, "--follow"]
        first = subprocess.Popen(command, env=environment)
        before = wait_for(out, rows // 3, first)
        subprocess.run([REELRAY, "batch", "stop", str(out)], check=True)
        stopped = first.wait()
        before |= stamps(out)
        status = subprocess.run([REELRAY, "batch", "resume", str(out), "--address", address, "--follow"], check=False).returncode
        after = stamps(out)
        twice = sum(after[name] != stamp for name, stamp in before.items())
        line = [rows, len(before), stopped, len(after), POISONED, twice, rows - len(after) - POISONED, status]
        head = ["rows", "done at the stop", "its exit status", "done", "refused", "done twice", "missing", "exit status"]
        report.add(table("As a Ray job, stopped and resumed", head, [line]))
    finally:
        subprocess.run([*ray, "stop", "--force"], check=False, env=environment)


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", default=["drill", "throughput", "memory", "cluster"])
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--save", action="store_true")
    if sys.argv[1:2] == ["pipeline"]:
        return pipeline(*sys.argv[2:])
    if sys.argv[1:2] == ["nothing"]:
        return nothing(*sys.argv[2:])
    options = parser.parse_args()
    report = Report("batch", "Batch rendering", __doc__, "`make bench-batch`")
    with TemporaryDirectory(prefix="reelray-") as folder:
        place = Place(Path(folder))
        for part in options.parts:
            if part == "memory":
                memory(place, (options.rows, 100 * options.rows), report)
            else:
                {"drill": drill, "throughput": throughput, "cluster": cluster}[part](place, options.rows, report)
    if options.save:
        report.save()
    return None


if __name__ == "__main__":
    main()
