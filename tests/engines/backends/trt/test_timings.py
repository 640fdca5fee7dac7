"""How `build_plan` uses a timing cache. `fake_tensorrt` stands in for the builder; nothing is measured."""

import json
from pathlib import Path

import pytest

from engines.backends.trt.build import BuildOptions, build_plan
from engines.backends.trt.profiles import profile_of
from engines.errors import EngineError
from tests.engines.backends.trt.fake_tensorrt import fake_plan, fake_tensorrt
from tests.engines.backends.trt.scaled import FAMILIES, scaled_call

CALL = scaled_call()
PROFILES = [profile_of(CALL, family) for family in FAMILIES]


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    (tmp_path / "graph.onnx").write_text(json.dumps(fake_plan(CALL, ())))
    return tmp_path / "graph.onnx"


def test_a_build_begins_with_the_timings_of_the_one_before_and_gives_its_own(graph: Path):
    first = build_plan(fake_tensorrt(), graph, PROFILES)
    assert first.timings == b"+"
    assert build_plan(fake_tensorrt(), graph, PROFILES, timings=first.timings).timings == b"++"
    assert len(json.loads(first.plan)["profiles"]) == len(FAMILIES)


@pytest.mark.parametrize("timings", [b"unreadable", b"of another GPU"])
def test_timings_that_the_library_refuses_are_logged_and_replaced(graph: Path, timings: bytes, caplog: pytest.LogCaptureFixture):
    built = build_plan(fake_tensorrt(), graph, PROFILES, timings=timings)
    assert built.timings == b"+"
    assert [record.action for record in caplog.records] == ["timings_refused"]


def test_a_plan_to_be_refitted_is_not_built_by_the_version_that_loses_biases(graph: Path):
    library = fake_tensorrt("11.3.0.14")
    with pytest.raises(EngineError, match="can lose biases"):
        build_plan(library, graph, PROFILES, BuildOptions(refit=True))
    assert build_plan(library, graph, PROFILES).plan


def test_a_version_that_is_too_old_does_not_build(graph: Path):
    with pytest.raises(EngineError, match="too old"):
        build_plan(fake_tensorrt("10.13.3.9"), graph, PROFILES)
