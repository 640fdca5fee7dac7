"""`reelray engines` on the demo's weights. A fake stands in for the engines; of TensorRT only plan files are tested."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from deployments.settings import Settings
from engines.backends import prepared
from engines.backends.backend import Eager
from engines.backends.config import EngineConfig
from engines.backends.trt.cache import PlanCache
from engines.backends.unet_call import UNetCall
from engines.errors import EngineError
from tests.deployments.cli.test_main import config, run
from tests.engines.backends.trt.keys import KEY, PLAN


class Off(Eager):
    """Returns the modules' result with an error of `fault` times its largest value."""

    name = "inductor"
    fault = 1e-6

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        expected = super().__call__(inputs)
        return expected + self.fault * expected.abs().max()


@pytest.fixture
def path(tmp_path: Path, demo_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A YAML that asks for inductor at small shapes."""

    def load(config: EngineConfig, call: UNetCall, *_: Any) -> Eager:
        if config.back_end == "tensorrt":
            raise EngineError("tensorrt cannot be imported: there is no such module")
        return Off(call)

    monkeypatch.setattr(prepared, "load_engine", load)
    engine = {"back_end": "inductor", "shapes": [[6, 64, 64]], "folder": str(tmp_path / "engines")}
    models = {model: {"engine": engine, "threads": 1} for model in ("animatediff", "controlnext")}
    args = {"home": str(demo_settings.home), **models}
    yield config(tmp_path, **args)
    Off.fault = 1e-6


def test_build_makes_every_call_of_every_endpoint_ready(path: Path):
    done = run("engines", "build", "--config", path)
    assert done.exit_code == 0, done.output
    assert all(call in done.stdout for call in ("motion-1-controlled", "motion-2-controlled", "svd-controlled"))


def test_build_fails_and_says_why_where_an_engine_is_missing(path: Path):
    path.write_text(path.read_text().replace("inductor", "tensorrt", 1))
    done = run("engines", "build", "--config", path)
    assert done.exit_code == 1
    assert "there is no such module" in done.stdout


@pytest.mark.parametrize("command", ["build", "verify"])
def test_there_must_be_an_engine_to_work_on(command: str, tmp_path: Path, demo_settings: Settings):
    done = run("engines", command, "--config", config(tmp_path, home=str(demo_settings.home)))
    assert done.exit_code == 1
    assert "engine.back_end" in done.stderr


def test_verify_passes_rounding_and_no_more(path: Path):
    done = run("engines", "verify", "--config", path)
    assert done.exit_code == 0, done.output
    assert done.stdout.count("6 x 8 x 8") == 3
    Off.fault = 0.01
    done = run("engines", "verify", "--config", path)
    assert done.exit_code == 1
    assert done.stdout.count("too far") == 3
    Off.fault = float("nan")
    assert run("engines", "verify", "--config", path).exit_code == 1


def test_plans_are_listed_and_inspected(path: Path, tmp_path: Path):
    cache = PlanCache(tmp_path / "engines")
    cache.get(KEY, lambda: PLAN)
    done = run("engines", "list", "--config", path)
    assert done.exit_code == 0, done.output
    assert KEY.digest[:12] in done.stdout
    assert KEY.gpu.name in done.stdout
    shown = json.loads(run("engines", "inspect", KEY.digest[:6], "--config", path).stdout)
    assert shown["key"]["graph"] == KEY.graph
    assert shown["report"] is None
    assert "tensorrt" in shown["why"]


def test_a_damaged_plan_is_named(path: Path, tmp_path: Path):
    cache = PlanCache(tmp_path / "engines")
    cache.get(KEY, lambda: PLAN)
    (plan,) = cache.folder.glob("*.plan")
    plan.write_bytes(plan.read_bytes()[:-1])
    done = run("engines", "list", "--config", path)
    assert done.exit_code == 1
    assert "damaged" in done.stdout
    assert "damaged" in run("engines", "inspect", KEY.digest[:6], "--config", path).stderr
    assert "0 plans begin with abc" in run("engines", "inspect", "abc", "--config", path).stderr
