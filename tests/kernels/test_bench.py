import json
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from kernels import bench
from kernels.bench import Contest, GPULostError, Result, Site, all_sites, append, compare, measure, measure_sites
from kernels.choice import record_of, records_in

CPU = torch.device("cpu")


@pytest.mark.parametrize("site", all_sites(), ids=lambda site: f"{site.operation}-{site.name}")
def test_every_way_of_a_site_computes_the_same(site: Site):
    result = measure(site, CPU, torch.float32, tiny=True)
    assert result.ours
    assert result.theirs
    assert not result.refused


def site(ours: bench.Way, *theirs: bench.Way) -> Site:
    contest = Contest((1,), {"ours": ours}, {f"theirs {i}": way for i, way in enumerate(theirs)})
    return Site("operation", "site", 1, lambda device, dtype, tiny: contest)


def test_a_way_with_other_values_is_an_error_not_a_figure():
    with pytest.raises(ArithmeticError, match="ours"):
        measure(site(partial(torch.full, (3,), 1.1), partial(torch.ones, 3)), CPU, torch.float32)
    with pytest.raises(ArithmeticError, match="ours"):
        measure(site(partial(torch.full, (3,), float("nan")), partial(torch.ones, 3)), CPU, torch.float32)


def test_a_way_that_does_not_serve_is_recorded_as_refused():
    def refuses() -> torch.Tensor:
        raise RuntimeError("No available kernel.\nMore words.")

    result = measure(site(partial(torch.ones, 3), partial(torch.ones, 3), refuses), CPU, torch.float32)
    assert result.refused == {"theirs 1": "No available kernel."}
    assert list(result.theirs) == ["theirs 0"]


def test_every_site_is_compiled_however_many_closures_of_one_function_came_before():
    compiled: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        compiled.append(graph)
        return graph

    def prepare(size: int, *_: Any) -> Contest:
        def way() -> torch.Tensor:
            return torch.ones(size) + size

        return Contest((size,), {"ours": way}, {"inductor": torch.compile(way, backend=count, dynamic=False)})

    for size in range(10):
        compare(Site("operation", "site", 1, partial(prepare, size + 1)), CPU, torch.float32)
    assert len(compiled) == 10


def test_an_error_that_stays_with_the_gpu_ends_the_run_and_is_not_the_next_ways(monkeypatch: pytest.MonkeyPatch):
    broken = False

    def breaks() -> torch.Tensor:
        nonlocal broken
        broken = True
        return torch.ones(3)

    def synchronize(_: Any) -> None:
        if broken:
            raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(GPULostError, match=r"ours left the GPU unusable: an illegal memory access"):
        compare(site(breaks, partial(torch.ones, 3)), torch.device("cuda"), torch.float32)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that a record can name, on which every measurement gives one microsecond."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200 (80 GB)")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    monkeypatch.setattr(bench, "microseconds", lambda way, device: 1.0)


@pytest.mark.usefixtures("gpu")
def test_other_values_at_a_site_and_the_loss_of_the_gpu_cost_no_other_sites_figures(tmp_path: Path):
    def lost() -> torch.Tensor:
        raise GPULostError("lost")

    good, other = (site(partial(torch.full, (3,), value), partial(torch.ones, 3)) for value in (1.0, 1.1))
    sites = [replace(good, operation="a"), replace(other, operation="a", name="other"), replace(good, operation="b")]
    with records_in(tmp_path), Console(file=StringIO()) as console:
        assert not measure_sites(sites, torch.device("cuda"), torch.float32, console)
        end = Site("c", "lost", 1, lambda *_: lost())
        with pytest.raises(GPULostError):
            measure_sites([replace(good, operation="c"), end], torch.device("cuda"), torch.float32, console)
        runs = json.loads(record_of("NVIDIA H200 (80 GB)").read_text())
    recorded = [(result["operation"], result["site"]) for run in runs for result in run["results"]]
    assert recorded == [("a", "site"), ("b", "site"), ("c", "site")]


def test_gain_compares_the_best_of_each_side():
    assert Result("o", "s", (1,), 1, {"a": 4.0, "b": 2.0}, {"c": 6.0, "d": 5.0}, {}, 0.0).gain == 2.5


@pytest.mark.usefixtures("gpu")
def test_runs_are_appended_to_the_gpus_file(tmp_path: Path):
    result = Result("o", "s", (1,), 1, {"a": 4.0}, {"c": 6.0}, {}, 0.0)
    for _ in range(2):
        path = append(tmp_path, [result], CPU, torch.float16)
    runs = json.loads(path.read_text())
    assert path.name == "nvidia-h200-80-gb.json"
    assert len(runs) == 2
    assert runs[1]["results"][0]["gain"] == 1.5
    assert {"gpu", "capability", "versions", "date", "dtype"} <= set(runs[1])


def test_without_a_gpu_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["motion 64", "--results", str(tmp_path)]) == 0
    assert "nothing recorded" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
