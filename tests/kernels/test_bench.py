import json
from functools import partial
from pathlib import Path

import pytest
import torch

from kernels import bench
from kernels.bench import Contest, Result, Site, all_sites, append, measure

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


def test_gain_compares_the_best_of_each_side():
    assert Result("o", "s", (1,), 1, {"a": 4.0, "b": 2.0}, {"c": 6.0, "d": 5.0}, {}, 0.0).gain == 2.5


def test_runs_are_appended_to_the_gpus_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200 (80 GB)")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
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
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    bench.main(["motion 64"])
    assert "nothing recorded" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
