"""The GPU benchmark's code at tiny sizes on the CPU: both sides do the same work, and figures are saved as they are measured."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from engines.backends.exact_shapes import ExactShapes, Ready
from engines.bench import __main__ as bench
from engines.bench import unet_cases
from engines.bench.measure import Case, Row, Way, measure
from engines.bench.options import Options
from engines.bench.record import Record, table, told

CPU = torch.device("cpu")
EAGER = Options(graph=False, inductor=False, compile_theirs=False, autotune=False, unet_rounds=1, job_rounds=1)


def returning(value: float) -> Way:
    return lambda: torch.tensor([value, 1.0])


def failing() -> Tensor:
    raise RuntimeError("[/no] memory\nand more")


@pytest.mark.parametrize("model", bench.MODELS)
def test_ours_and_theirs_do_the_same_work_and_every_case_is_told_at_once(model: str):
    so_far: list[int] = []
    rows = bench.measure_model(model, bench.PARTS, CPU, torch.float32, EAGER, lambda rows: so_far.append(len(rows)))
    assert so_far == ([3, 6, 8] if model == "animatediff" else [3, 5])
    unet, job = ["diffusers", "ours", "ours, every kernel"], ["diffusers", "ours"]
    assert [row.way for row in rows] == [*unet, *unet, *job] if model == "animatediff" else [*unet, *job]
    for row in rows:
        assert not row.refused
        assert row.difference is not None
        assert row.difference <= 1e-4
        assert row.median_s > 0


class Recorded(ExactShapes):
    """Runs the modules themselves in place of a CUDA graph."""

    name = "cuda_graph"

    def made_ready(self, buffers: Mapping[str, Tensor]) -> Ready:
        return lambda inputs: self.call.module(*inputs.values())


@pytest.mark.parametrize(("model", "holds"), [("animatediff", True), ("controlnext", True), ("controlnext", False)])
def test_a_job_is_run_by_its_engine_or_refused(monkeypatch: pytest.MonkeyPatch, model: str, holds: bool):
    monkeypatch.setattr(unet_cases, "GraphEngine", Recorded)
    if not holds:
        monkeypatch.setattr(Recorded, "holds", lambda self, shape: False)
    *_, graphed = bench.measure_model(model, ("jobs",), CPU, torch.float32, replace(EAGER, graph=True), lambda rows: None)
    assert graphed.way == "ours, CUDA graph"
    assert graphed.refused == ("" if holds else "EngineError: the UNet was run by eager, not by cuda_graph")
    assert graphed.agrees


def test_work_that_is_not_the_same_is_marked():
    case = Case("model", "case", {"theirs": lambda: returning(2.0), "ours": lambda: returning(2.1)}, 2)
    *_, rows = measure(case, CPU, torch.float32)
    assert [row.agrees for row in rows] == [True, False]
    assert rows[1].difference == pytest.approx(0.05)
    assert [len(row.times_s) for row in rows] == [2, 2]


def test_a_value_that_is_no_number_is_not_the_same_work():
    case = Case("model", "case", {"theirs": lambda: returning(2.0), "ours": lambda: returning(float("nan"))}, 1)
    *_, (_, ours) = measure(case, CPU, torch.float32)
    assert not ours.agrees
    assert json.loads(json.dumps(told(ours), allow_nan=False))["difference"] is None


def test_a_way_that_fails_is_told_and_the_others_are_measured():
    case = Case("model", "case", {"theirs": lambda: returning(2.0), "broken": lambda: failing, "ours": lambda: returning(2.0)}, 1)
    *_, (theirs, broken, ours) = measure(case, CPU, torch.float32)
    assert broken.refused == "RuntimeError: [/no] memory\nand more"
    assert theirs.times_s
    assert ours.times_s
    Console().print(table([theirs, broken, ours]))  # must not fail, whatever the text is


def test_what_is_quick_is_told_before_what_is_slow_is_made_ready():
    made = []

    def compiled() -> Way:
        made.append("compiled")
        return returning(2.0)

    case = Case("model", "case", {"theirs": lambda: returning(2.0), "compiled": compiled}, 3, frozenset({"compiled"}))
    steps = measure(case, CPU, torch.float32)
    assert [row.way for row in next(steps)] == ["theirs"]
    assert not made
    assert [row.way for row in next(steps)] == ["theirs", "compiled"]


def test_nothing_slow_is_begun_when_its_time_is_over():
    case = Case("model", "case", {"theirs": lambda: returning(2.0), "compiled": lambda: failing}, 1, frozenset({"compiled"}))
    *_, (theirs, compiled) = measure(case, CPU, torch.float32, slow_until=0.0)
    assert theirs.times_s
    assert compiled.refused == "no time left"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives a GPU's properties, which a record contains."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)


@pytest.mark.usefixtures("gpu")
def test_a_run_is_one_entry_that_grows_behind_earlier_runs(tmp_path: Path):
    row = Row("animatediff", "job", "ours", (0.5, 0.7, 0.6), 2.0, 10**9, 1e-3)
    for _ in range(2):
        run = Record(tmp_path, CPU, torch.float16, EAGER)
        run.write([row])
        run.write([row, replace(row, way="broken", times_s=(), refused="no")])
    assert run.path == tmp_path / "nvidia-h200.json"
    assert list(tmp_path.iterdir()) == [run.path]
    _, last = json.loads(run.path.read_text())
    assert {"gpu", "capability", "driver", "versions", "date", "dtype", "options", "results"} <= last.keys()
    assert {"torch", "triton", "cuda", "cudnn", "diffusers"} <= last["versions"].keys()
    ours, broken = last["results"]
    assert ours["median_s"] == 0.6
    assert ours["working_bytes"] == 10**9
    assert broken["refused"] == "no"
    assert "median_s" not in broken


def test_tiny_sizes_are_shown_and_never_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert bench.main(["--tiny", "--only", "unet", "--model", "controlnext", "--results", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "UNet call" in shown
    assert "nothing recorded" in shown
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_none_is_pretended(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--gpu"]) == 2
    assert "No GPU" in capsys.readouterr().out
