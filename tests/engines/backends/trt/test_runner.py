"""Our own logic around TensorRT. `fake_tensorrt` stands in for the library, which is neither run nor tested here."""

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from engines.backends.shapes import Shape, ShapeFamily
from engines.backends.trt.inspection import Layer, Port, layers_of
from engines.backends.trt.runner import TensorRTEngine
from engines.backends.unet_call import UNetCall
from engines.errors import EngineError
from tests.engines.backends.trt.fake_tensorrt import MEMORY_BYTES, FakeStream, Runtime, fake_plan, fake_tensorrt
from tests.engines.backends.trt.scaled import FAMILIES, FIXED, WIDE, inputs_of, scaled_call

CALL = scaled_call(2.0)
FIXED_SHAPE, OTHER_SHAPE = FIXED.best, Shape(3, 8, 12)


def engine(plan: dict[str, Any] | bytes | None = None, call: UNetCall = CALL, **options: Any) -> TensorRTEngine:
    """An engine in the fake library. options: arguments of its constructor."""
    made = fake_plan(call, FAMILIES) if plan is None else plan
    written = made if isinstance(made, bytes) else json.dumps(made).encode()
    arguments = {"library": fake_tensorrt(), "families": FAMILIES, "stream": FakeStream(), **options}
    return TensorRTEngine(written, call=call, **arguments)


def expected(call: UNetCall, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return call.module(*inputs.values())


def changed(plan: dict[str, Any], part: str, **values: Any) -> dict[str, Any]:
    return {**plan, part: {**plan[part], **values}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
def test_calls_of_several_shapes_in_turn_give_what_the_module_gives(graphs: bool, dtype: torch.dtype):
    call = scaled_call(2.0, dtype)
    ready = engine(fake_plan(call, FAMILIES), call, graphs=graphs)
    for seed, shape in enumerate([FIXED_SHAPE, OTHER_SHAPE, FIXED_SHAPE, WIDE.largest, WIDE.smallest, OTHER_SHAPE]):
        inputs = inputs_of(call, shape, seed)
        torch.testing.assert_close(ready(inputs), expected(call, inputs))


def test_inputs_are_known_by_name_whatever_their_order():
    inputs = inputs_of(CALL, FIXED_SHAPE)
    turned = dict(reversed(inputs.items()))
    torch.testing.assert_close(engine()(turned), expected(CALL, inputs))


def test_a_result_is_the_callers_to_keep():
    ready = engine()
    first = ready(inputs_of(CALL, FIXED_SHAPE, 1))
    kept = first.clone()
    ready(inputs_of(CALL, FIXED_SHAPE, 2))
    assert torch.equal(first, kept)


def test_it_can_be_made_and_called_in_and_out_of_inference_mode():
    with torch.inference_mode():
        ready = engine()
        inputs = inputs_of(CALL, FIXED_SHAPE)
        ready(inputs)
    inputs = inputs_of(CALL, FIXED_SHAPE, 3)
    torch.testing.assert_close(ready(inputs), expected(CALL, inputs))
    with torch.inference_mode():
        torch.testing.assert_close(ready(inputs), expected(CALL, inputs))


def test_each_shape_is_recorded_once():
    stream = FakeStream()
    ready = engine(stream=stream)
    for shape in (FIXED_SHAPE, OTHER_SHAPE, FIXED_SHAPE, OTHER_SHAPE):
        ready(inputs_of(CALL, shape))
    assert stream.captures == 2


def test_without_graphs_nothing_is_recorded():
    stream = FakeStream()
    engine(stream=stream, graphs=False)(inputs_of(CALL, FIXED_SHAPE))
    assert stream.captures == 0


def test_each_shape_runs_in_its_narrowest_family_in_a_context_of_its_own():
    ready = engine()
    contexts = ready._engine.hidden_contexts
    assert not contexts
    ready(inputs_of(CALL, FIXED_SHAPE))
    assert [context.hidden_profile for context in contexts] == [1], "the fixed family, which is the narrower one, is the second"
    for shape in (OTHER_SHAPE, WIDE.largest, FIXED_SHAPE):
        ready(inputs_of(CALL, shape))
    assert [context.hidden_profile for context in contexts] == [1, 0, 0]


def test_it_holds_what_a_family_holds_and_the_unet_can_halve():
    ready = engine()
    assert ready.name == "tensorrt"
    assert ready.holds(FIXED_SHAPE)
    assert ready.holds(WIDE.largest)
    assert not ready.holds(Shape(7, 8, 8))
    assert not ready.holds(Shape(4, 8, 9))


def test_a_shape_of_no_family_is_refused():
    with pytest.raises(EngineError, match="no profile of scaled holds"):
        engine()(inputs_of(CALL, Shape(7, 8, 8)))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("time", torch.zeros(1, 1), r"time is torch\.float32 \(1, 1\) instead of torch\.float32 \(1, 3\)"),
        ("time", torch.zeros(1, 3, dtype=torch.float64), "time is torch.float64"),
        ("skip_0", torch.zeros(1, 8, 4, 4), "skip_0 is"),
        ("mid", torch.zeros(1), "takes"),
    ],
    ids=["shape", "dtype", "would broadcast", "unknown"],
)
def test_an_input_that_is_not_the_calls_is_refused_and_not_converted(name: str, value: torch.Tensor, words: str):
    with pytest.raises(EngineError, match=words):
        engine()({**inputs_of(CALL, FIXED_SHAPE), name: value})


def test_an_input_that_is_missing_is_refused():
    inputs = inputs_of(CALL, FIXED_SHAPE)
    del inputs["skip_0"]
    with pytest.raises(EngineError, match="takes"):
        engine()(inputs)


def test_a_plan_that_cannot_be_loaded_says_why_in_the_librarys_words():
    with pytest.raises(EngineError, match="the plan cannot be loaded: magic tag does not match"):
        engine(b"no plan")


def test_a_factory_that_gives_nothing_is_our_error():
    library = fake_tensorrt()

    class Refusing(Runtime):
        def __init__(self, logger: Any) -> None:
            logger.log(logger.Severity.ERROR, "no driver")
            raise TypeError("factory function returned nullptr")

    library.Runtime = Refusing  # type: ignore[attr-defined]
    with pytest.raises(EngineError, match="the runtime cannot be made: no driver; factory function returned nullptr"):
        engine(library=library)


PLAN = fake_plan(CALL, FAMILIES)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({**PLAN, "tensors": {k: v for k, v in PLAN["tensors"].items() if k != "skip_0"}}, r"lacks \['skip_0'\] of scaled"),
        ({**PLAN, "tensors": {k: v for k, v in PLAN["tensors"].items() if k != "output"}}, r"lacks \['output'\]"),
        (changed(PLAN, "tensors", mid=["INPUT", "FLOAT", [1]]), r"has \['mid'\]"),
        (changed(PLAN, "tensors", time=["INPUT", "HALF", [1, 3]]), "time is HALF in the plan, and torch.float32 in scaled"),
        (changed(PLAN, "tensors", time=["OUTPUT", "FLOAT", [1, 3]]), "time is no INPUT of the plan"),
        ({**PLAN, "profiles": PLAN["profiles"][:1]}, "1 profiles for 2 families"),
        ({**PLAN, "profiles": PLAN["profiles"][::-1]}, "in the plan's profile 0"),
    ],
    ids=["an input", "the output", "one more input", "another dtype", "another mode", "fewer profiles", "other profiles"],
)
def test_a_plan_of_another_call_is_refused(plan: dict[str, Any], words: str):
    with pytest.raises(EngineError, match=words):
        engine(plan)


@pytest.mark.parametrize(
    ("fault", "words"),
    [("execute", "scaled at .* has failed: out of registers"), ("shape", "is refused: latents does not satisfy the profile")],
)
def test_a_call_that_fails_says_why_and_the_next_one_is_tried_anew(fault: str, words: str):
    plan = fake_plan(CALL, FAMILIES, faults=[fault])
    ready = engine(plan)
    inputs = inputs_of(CALL, FIXED_SHAPE)
    for _ in range(2):
        with pytest.raises(EngineError, match=words):
            ready(inputs)
    ready._engine.hidden_plan["faults"].clear()
    torch.testing.assert_close(ready(inputs), expected(CALL, inputs))


@pytest.mark.parametrize("version", ["8.6.1", "10.13.2.6", "10.15.1"])
def test_a_version_that_is_too_old_is_refused(version: str):
    with pytest.raises(EngineError, match=f"{version} is too old"):
        engine(library=fake_tensorrt(version))


@pytest.mark.parametrize("version", ["10.16.0.72", "11.0.0", "11.3.0.14", "12.1"])
def test_other_versions_run_plans(version: str):
    assert engine(library=fake_tensorrt(version)).holds(FIXED_SHAPE)


@pytest.fixture
def refittable() -> TensorRTEngine:
    return engine(fake_plan(CALL, FAMILIES, refittable=True))


def weights(folder: Path, text: str) -> Path:
    path = folder / "weights.onnx"
    path.write_text(text)
    return path


def test_new_weights_are_used_by_shapes_that_were_recorded_before(refittable: TensorRTEngine, tmp_path: Path):
    inputs = {shape: inputs_of(CALL, shape) for shape in (FIXED_SHAPE, OTHER_SHAPE)}
    for given in inputs.values():
        refittable(given)
    refittable.refit(weights(tmp_path, "5"))
    for given in inputs.values():
        torch.testing.assert_close(refittable(given), expected(scaled_call(5.0), given))
    assert len(refittable._engine.hidden_contexts) == 2, "contexts stay"


def test_weights_that_do_not_fit_say_why_and_no_call_runs_until_others_are_in(refittable: TensorRTEngine, tmp_path: Path):
    inputs = inputs_of(CALL, FIXED_SHAPE)
    with pytest.raises(EngineError, match=r"1 of whose weights are missing \(weight\): no number"):
        refittable.refit(weights(tmp_path, "none"))
    with pytest.raises(EngineError, match="failed half way"):
        refittable(inputs)
    refittable.refit(weights(tmp_path, "3"))
    torch.testing.assert_close(refittable(inputs), expected(scaled_call(3.0), inputs))


def test_weights_that_the_engine_refuses_say_why(tmp_path: Path):
    refused = engine(fake_plan(CALL, FAMILIES, refittable=True, faults=["refit"]))
    with pytest.raises(EngineError, match="are refused: validation failed"):
        refused.refit(weights(tmp_path, "3"))


def test_a_plan_that_is_not_refittable_is_not_refitted(tmp_path: Path):
    ready = engine()
    with pytest.raises(EngineError, match="not built to be refitted"):
        ready.refit(weights(tmp_path, "3"))
    assert ready(inputs_of(CALL, FIXED_SHAPE)) is not None, "it still runs"


def test_the_version_that_loses_biases_is_not_refitted(tmp_path: Path):
    library: ModuleType = fake_tensorrt("11.3.0.14")
    ready = engine(fake_plan(CALL, FAMILIES, refittable=True), library=library)
    with pytest.raises(EngineError, match="can lose biases"):
        ready.refit(weights(tmp_path, "3"))


def test_an_engine_reports_its_layers_ports_and_memory():
    told = {"Layers": [{"Name": "conv_in + silu", "LayerType": "CaskConvolution", "TacticName": "sm90_xmma"}]}
    report = engine(fake_plan(CALL, FAMILIES, report=json.dumps(told))).inspect()
    assert report.layers == (Layer("conv_in + silu", "CaskConvolution", "sm90_xmma"),)
    assert report.ports[1] == Port("time", "INPUT", "FLOAT", (1, 3))
    assert report.ports[-1] == Port("output", "OUTPUT", "FLOAT", (2, 4, -1, -1, -1))
    assert report.memory_bytes == (MEMORY_BYTES, MEMORY_BYTES)
    assert (report.version, report.refittable) == ("11.4.0.106", False)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ('{"Layers": ["a", "b"], "Bindings": ["x", "y"]}', (Layer("a", "", ""), Layer("b", "", ""))),
        ('{"Layers": [{"Name": "a", "TacticValue": "0x1"}], "I/O Tensors": [{"Name": "x"}]}', (Layer("a", "", "0x1"),)),
        ('{"Layers": [{}]}', (Layer("", "", ""),)),
        ('{"Layers": null}', ()),
        ("[]", ()),
        ("no JSON", ()),
        ("", ()),
    ],
    ids=["10.x, names alone", "11.x", "an empty layer", "none", "a list", "no JSON", "nothing"],
)
def test_a_report_is_read_whatever_it_lacks(text: str, layers: tuple[Layer, ...]):
    assert layers_of(text) == layers


def test_the_narrower_of_two_families_is_the_one_with_fewer_shapes():
    long = ShapeFamily(Shape(1, 8, 8), Shape(4, 8, 8), Shape(32, 8, 8))
    large = ShapeFamily(Shape(4, 8, 8), Shape(4, 8, 8), Shape(4, 16, 16))
    families = (large, long)
    ready = engine(fake_plan(CALL, families), families=families)
    ready(inputs_of(CALL, replace(FIXED_SHAPE)))
    assert [context.hidden_profile for context in ready._engine.hidden_contexts] == [1]
