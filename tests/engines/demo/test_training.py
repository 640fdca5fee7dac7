"""Training is seeded, and resumable to the step."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engines.demo.training import Pace, Run, Schedule, averaged


class LineTask:
    """Fits a line to points that it draws itself."""

    name = "line"
    schedule = Schedule(12, 0.1, warmup=2, hold=0.5, average=0.9)

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Linear(1, 1)
        self.sheets: list[str] = []

    def losses(self, step: int, rng: torch.Generator) -> dict[str, Tensor]:
        x = torch.randn(8, 1, generator=rng)
        loss = (self.net(x) - 3 * x - 1).square().mean()
        return {"loss": loss, "step": torch.tensor(float(step))}

    def sheet(self, path: Path) -> str:
        assert not self.net.training
        self.sheets.append(path.name)
        return "fine"


def state(folder: Path) -> dict[str, object]:
    saved = torch.load(folder / "line" / "state.pt", weights_only=True)
    return {"step": saved["step"], **{f"{kind} {key}": v for kind in ("net", "average") for key, v in saved[kind].items()}}


def test_a_run_that_was_cut_off_ends_in_the_state_of_an_unbroken_one(tmp_path: Path):
    Run(LineTask(), tmp_path / "whole").train(lambda _: None)
    for until in (1, 5, None):
        Run(LineTask(), tmp_path / "parts").train(lambda _: None, until)
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert whole["step"] == 12
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)
    Run(LineTask(), tmp_path / "other", seed=1).train(lambda _: None)
    assert state(tmp_path / "other")["net weight"] != whole["net weight"]


def test_a_run_starts_once_reports_its_progress_and_draws_the_averaged_weights(tmp_path: Path):
    task, lines, starts = LineTask(), list[str](), list[int]()

    def start() -> None:
        starts.append(1)
        nn.init.zeros_(task.net.weight)

    pace = Pace(report_steps=4, sheet_steps=5)
    Run(task, tmp_path, pace=pace, start=start).train(lines.append, until=6)
    again = Run(task, tmp_path, pace=pace, start=start)
    again.train(lines.append)
    again.sheet(lines.append)
    assert again.done
    assert starts == [1]
    assert task.sheets == ["sheet-000005.png", "sheet-000010.png", "sheet-000012.png"]
    assert lines[0].startswith("line: step 4/12, loss ")
    assert lines[0].endswith(" s a step, 0 min left")
    assert "line: step 12: fine" in lines
    assert (tmp_path / "line" / "curve.png").is_file()
    average = averaged(LineTask(), tmp_path)
    assert average.weight != task.net.weight
    assert not average.weight.requires_grad


def test_the_rate_warms_up_holds_and_falls_to_zero():
    schedule = Schedule(100, 1.0, warmup=10, hold=0.5)
    rates = [schedule.rate_at(step) for step in (0, 9, 49, 75, 100)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 0.5, 0.0])
