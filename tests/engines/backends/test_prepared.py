"""Which engine runs a call, and what happens without one. Fakes stand in for engines; real ones have their own tests."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.utils._python_dispatch import TorchDispatchMode

from engines import registry
from engines.animatediff.config import AnimateDiffConfig, AnimateDiffWeights
from engines.animatediff.spec import AnimateDiffSpec
from engines.backends import prepared
from engines.backends.backend import Eager
from engines.backends.config import EngineConfig
from engines.backends.inductor import InductorEngine
from engines.backends.shapes import Shape
from engines.backends.unet_call import UNetCall
from engines.controlnext.call import svd_inputs
from engines.controlnext.config import ControlNeXtConfig
from engines.controlnext.demo_weights import write_demo_weights
from engines.controlnext.denoise import FAMILIES
from engines.controlnext.denoise import Denoise as ControlNeXtDenoise
from engines.controlnext.nets.unet import Control, Half
from engines.errors import EngineError
from engines.pipeline import Pipeline
from engines.registry import build_stage
from tests.engines.animatediff.media import keyframes
from tests.engines.controlnext.conftest import conditioning

MODEL = "animatediff-sparsectrl-lcm"
INDUCTOR = EngineConfig("inductor")  # the fakes take its place


class FakeEngine(Eager):
    """Runs the module on flat tensors, as a real engine does; fails after `calls` calls."""

    name = "inductor"

    def __init__(self, call: UNetCall, calls: int = 1_000_000):
        super().__init__(call)
        self.calls = calls

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        if self.calls == 0:
            raise EngineError("the device has gone away")
        self.calls -= 1
        return super().__call__(inputs)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[FakeEngine]:
    made: list[FakeEngine] = []

    def load(config: EngineConfig, call: UNetCall, *_: Any) -> FakeEngine:
        made.append(FakeEngine(call))
        return made[-1]

    monkeypatch.setattr(prepared, "load_engine", load)
    return made


def spec(guidance: float, controlled: bool) -> AnimateDiffSpec:
    return AnimateDiffSpec(3, 2, guidance, "a red ball", keyframes=keyframes(0, 8) if controlled else ())


@pytest.fixture(scope="module")
def eager(small_weights: AnimateDiffWeights) -> Pipeline:
    return Pipeline(MODEL, AnimateDiffConfig(weights=small_weights, threads=1))


@pytest.mark.parametrize("controlled", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_an_engine_renders_every_kind_of_clip(fakes: list[FakeEngine], eager: Pipeline, guidance: float, controlled: bool):
    pipeline = Pipeline(MODEL, replace(eager.denoise.config, engine=INDUCTOR))
    ours, expected = pipeline.latents(spec(guidance, controlled)), eager.latents(spec(guidance, controlled))
    assert torch.equal(ours.values, expected.values), "residuals of zero must change nothing"
    assert (ours.engine, expected.engine) == ("inductor", "eager")
    assert sum(1_000_000 - fake.calls for fake in fakes) == 2


def test_an_engine_renders_both_halves_of_a_driven_video(fakes: list[FakeEngine], tmp_path_factory: pytest.TempPathFactory):
    config = ControlNeXtConfig(weights=write_demo_weights(tmp_path_factory.mktemp("weights") / "controlnext"), threads=1)
    asked = conditioning(7, guidance_scale=2.0)
    expected = ControlNeXtDenoise(config).sample(asked)
    ours = ControlNeXtDenoise(replace(config, engine=INDUCTOR)).sample(asked)
    assert torch.allclose(ours.values, expected.values, atol=1e-5)
    assert (ours.engine, expected.engine) == ("inductor", "eager")
    assert len(fakes) == 1


def test_what_fails_on_the_way_is_rendered_eagerly_and_told(
    fakes: list[FakeEngine], eager: Pipeline, caplog: pytest.LogCaptureFixture
):
    pipeline = Pipeline(MODEL, replace(eager.denoise.config, engine=INDUCTOR))
    for fake in fakes:
        fake.calls = 1
    ours = pipeline.latents(spec(1.0, True))
    assert torch.equal(ours.values, eager.latents(spec(1.0, True)).values)
    assert ours.engine == "eager+inductor"
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert vars(record)["error"] == "the device has gone away"
    assert pipeline.latents(spec(1.0, True)).engine == "eager", "the failed engine is not called again"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error"), RuntimeError()])
def test_a_call_that_the_device_fails_is_rendered_eagerly_and_the_next_by_the_engine_again(
    fakes: list[FakeEngine], eager: Pipeline, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    pipeline = Pipeline(MODEL, replace(eager.denoise.config, engine=INDUCTOR))
    failures = iter([error])

    def call(self: FakeEngine, inputs: Mapping[str, Tensor]) -> Tensor:
        for failure in failures:
            raise failure
        return Eager.__call__(self, inputs)

    monkeypatch.setattr(FakeEngine, "__call__", call)
    ours = pipeline.latents(spec(1.0, True))
    assert torch.equal(ours.values, eager.latents(spec(1.0, True)).values)
    assert ours.engine == "eager+inductor"
    (record,) = [record for record in caplog.records if hasattr(record, "call") and record.levelno == logging.WARNING]
    assert type(error).__name__ in vars(record)["error"]
    assert pipeline.latents(spec(1.0, True)).engine == "inductor"


def test_engines_of_exact_shapes_are_prepared_for_the_default_shape_only(monkeypatch: pytest.MonkeyPatch):
    ready: list[Shape] = []
    monkeypatch.setattr(InductorEngine, "prepare", lambda self, shape: ready.append(shape))
    monkeypatch.setattr(InductorEngine, "holds", lambda self, shape: shape in ready)
    call = SimpleNamespace(name="svd-controlled", example={"latents": torch.zeros(1)}, shapes=lambda shape: {})
    engine = prepared.load_engine(INDUCTOR, call, FAMILIES, torch.device("cpu"))  # type: ignore[arg-type]
    assert ready == [Shape(24, 128, 72)]
    assert [engine.holds(family.best) for family in FAMILIES] == [True, False]


def test_an_engines_inputs_are_made_on_the_device():
    """A copy from the host waits for all work that the device has."""

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    seen: set[str] = set()
    latents = torch.zeros(2, 4, 8, 6)
    control = Control(torch.zeros(2, 32, 4, 3), 0.7)
    with Watched():
        inputs = svd_inputs(latents, Half(latents, []), [], control)
    assert inputs["control_scale"].tolist() == pytest.approx([0.7])
    assert seen <= {"new_full", "fill", "fill_"}


@pytest.mark.parametrize("error", [EngineError("no plan"), OSError(28, "No space"), torch.OutOfMemoryError("CUDA out of memory")])
def test_whatever_keeps_an_engine_from_being_made_costs_no_job(
    eager: Pipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
):
    def load(*_: Any) -> FakeEngine:
        raise error

    monkeypatch.setattr(prepared, "load_engine", load)
    pipeline = Pipeline(MODEL, replace(eager.denoise.config, engine=INDUCTOR))
    assert pipeline.latents(spec(1.0, False)).engine == "eager"
    assert len(pipeline.denoise.prepared.faults) == 2
    assert [record.levelno for record in caplog.records if hasattr(record, "call")][:2] == [logging.ERROR] * 2


def test_a_missing_engine_is_told_and_rendered_eagerly(eager: Pipeline, caplog: pytest.LogCaptureFixture):
    pipeline = Pipeline(MODEL, replace(eager.denoise.config, engine=EngineConfig("tensorrt")))
    told = [vars(record) for record in caplog.records if record.levelno == logging.ERROR]
    assert {record["call"] for record in told} == {"motion-1-controlled", "motion-2-controlled"}
    assert all("NVIDIA GPU" in record["error"] for record in told)
    assert pipeline.latents(spec(1.0, False)).engine == "eager"
    assert pipeline.denoise.engines == ()


def test_a_shape_that_was_not_prepared_is_told_once(fakes: list[FakeEngine], eager: Pipeline, caplog: pytest.LogCaptureFixture):
    pipeline = Pipeline(MODEL, replace(eager.denoise.config, engine=INDUCTOR))
    for fake in fakes:
        fake.holds = lambda shape: False  # type: ignore[method-assign]
    assert {pipeline.latents(spec(1.0, False)).engine for _ in range(2)} == {"eager"}
    warnings = [vars(record) for record in caplog.records if record.levelno == logging.WARNING and hasattr(record, "shape")]
    assert [(record["call"], record["shape"]) for record in warnings] == [("motion-1-controlled", str(Shape(16, 4, 4)))]


def test_engines_are_part_of_what_the_bits_depend_on(fakes: list[FakeEngine], eager: Pipeline):
    pipeline = Pipeline(MODEL, replace(eager.denoise.config, engine=INDUCTOR))
    assert pipeline.denoise.engines == (("motion-1-controlled", "inductor"), ("motion-2-controlled", "inductor"))
    assert eager.denoise.engines == ()


def test_what_inductor_compiles_stays_in_the_engines_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(registry, "import_module", lambda name: SimpleNamespace(Denoise=lambda config: None))
    build_stage(MODEL, "denoise", AnimateDiffConfig(threads=1, engine=EngineConfig("inductor", folder=tmp_path)))
    assert cache_dir() == str(tmp_path / "inductor")


@pytest.mark.parametrize("shape", [(0, 512, 512), (16, 513, 512), (16, 512, 4)])
def test_an_impossible_shape_is_refused(shape: tuple[int, int, int]):
    with pytest.raises(ValueError, match="shape"):
        EngineConfig("inductor", (shape,))
