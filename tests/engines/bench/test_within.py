"""The benchmark with a time limit, with parts that only sleep."""

import subprocess
import sys

import pytest

from engines.bench import within
from engines.bench.within import Outcome, Part, parts, run


def sleeping(name: str, seconds: float, least_s: int = 0, most_s: int = 100) -> Part:
    return Part(name, least_s, most_s, (sys.executable, "-c", f"import time; time.sleep({seconds})"))


def results(outcomes: list[Outcome]) -> list[str]:
    return [outcome.result for outcome in outcomes]


def test_a_part_that_does_not_fit_is_left_out_and_a_later_one_that_fits_is_run():
    assert results(list(run([sleeping("long", 0, least_s=60), sleeping("short", 0)], 30))) == ["left out", "done"]


def test_a_part_that_fails_costs_no_other():
    failing = Part("failing", 0, 100, (sys.executable, "-c", "raise SystemExit(3)"))
    assert results(list(run([failing, sleeping("after", 0)], 30))) == ["failed", "done"]


def test_a_part_is_stopped_with_its_workers_at_its_own_limit():
    worker = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(77.25)'])"
    with_worker = Part("with a worker", 0, 1, (sys.executable, "-c", worker))
    assert results(list(run([with_worker], 1000))) == ["stopped"]
    processes = subprocess.run(["ps", "-ef"], capture_output=True, text=True, check=True).stdout
    assert "time.sleep(77.25)" not in processes


def test_a_part_is_stopped_at_the_whole_limit():
    assert results(list(run([sleeping("late", 600), sleeping("none", 0, least_s=1)], 1))) == ["stopped", "left out"]


def test_the_summary_names_every_part(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.setattr(
        within, "parts", lambda folder: (sleeping("one", 0), sleeping("two", 0, least_s=99), sleeping("three", 0))
    )
    assert within.main(["--limit", "50", "--skip", "three"]) == 1
    *_, one, two = capfd.readouterr().out.splitlines()
    assert one.split()[:2] == ["one", "done"]
    assert two.split()[:3] == ["two", "left", "out"]


def test_what_is_recorded_is_measured_before_the_models_that_run_by_it():
    names = [part.name for part in parts(None)]
    assert names.index("kernels") < names.index("UNets") < names.index("jobs")
