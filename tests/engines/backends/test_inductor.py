"""The compiled engine on a CPU: a toy for what the engine decides, a tiny UNet of each family for what it must not change.

The default configuration's cache on disk is used, so that the second run on a machine takes seconds.
"""

import logging
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from engines.backends.backend import Eager, Engine
from engines.backends.cuda_graph import GraphEngine
from engines.backends.inductor import InductorEngine
from engines.backends.shapes import Shape
from engines.errors import EngineError
from tests.engines.backends.calls import OTHER, SHAPE, Toy, motion, random_inputs, svd, toy

pytestmark = [
    pytest.mark.skipif(
        not shutil.which("g++"), reason="no C++ compiler: not verified that the compiled UNets compute what the eager ones do"
    ),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),  # torch's own, of its own
]


@pytest.fixture(autouse=True)
def no_recompilation() -> Iterator[None]:
    """Of one test's code by another's."""
    yield
    torch.compiler.reset()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("make", [motion, svd])
def test_a_compiled_unet_computes_what_the_eager_one_does(make):
    call = make()
    engine: Engine = InductorEngine(call)
    engine.prepare(SHAPE)
    for seed in range(2):
        inputs = random_inputs(call, SHAPE, seed)
        with torch.inference_mode():
            expected, output = Eager(call)(inputs), engine(inputs)
        assert expected.std() > 0.01, "a comparison of nothing proves nothing"
        assert (output - expected).abs().max() <= 1e-4


def test_only_prepared_shapes_are_held():
    engine = InductorEngine(toy())
    assert not engine.holds(SHAPE)
    engine.prepare(SHAPE)
    assert engine.holds(SHAPE)
    assert not engine.holds(OTHER)
    with pytest.raises(EngineError, match=r"toy was not prepared for Shape\(frames=2"):
        engine(random_inputs(engine.call, OTHER))


def test_a_call_never_compiles_whatever_was_prepared_before_and_however_its_inputs_lie():
    engine = InductorEngine(toy())
    for shape in (SHAPE, OTHER):
        engine.prepare(shape)
    for shape in (SHAPE, OTHER):
        inputs = random_inputs(engine.call, shape)
        expected = engine.call.module(*inputs.values())
        for latents in (inputs["latents"], inputs["latents"].contiguous(memory_format=torch.channels_last)):
            with torch.compiler.set_stance("fail_on_recompile"):
                assert torch.equal(engine(inputs | {"latents": latents}), expected)


def test_the_compilers_own_limit_of_shapes_does_not_count():
    engine = InductorEngine(toy())
    with torch._dynamo.config.patch(recompile_limit=1):
        for shape in (SHAPE, OTHER):
            engine.prepare(shape)
    assert engine.holds(OTHER)


def test_the_result_is_the_callers_to_keep():
    engine = InductorEngine(toy())
    engine.prepare(SHAPE)
    first, second = (random_inputs(engine.call, SHAPE, seed) for seed in range(2))
    kept = engine(first)
    engine(second)
    assert torch.equal(kept, engine.call.module(*first.values()))


def test_preparing_twice_compiles_once(caplog: pytest.LogCaptureFixture):
    engine = InductorEngine(toy())
    with caplog.at_level(logging.INFO, "engines.backends.exact_shapes"):
        for _ in range(2):
            engine.prepare(SHAPE)
    (record,) = caplog.records
    assert (record.action, record.engine, record.call, record.frames) == ("shape_ready", "inductor", "toy", 3)


def test_threads_that_prepare_at_once_wait_for_each_other():
    inside: list[str] = []
    alone: list[bool] = []

    class Watched(Toy):
        def forward(self, latents: Tensor, bias: Tensor) -> Tensor:
            if not torch.compiler.is_compiling():
                inside.append("in")
                time.sleep(0.05)
                alone.append(len(inside) == 1)
                inside.pop()
            return super().forward(latents, bias)

    engines = [InductorEngine(toy(Watched())) for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda engine: engine.prepare(SHAPE), engines))
    assert alone == [True, True]
    inputs = random_inputs(engines[0].call, SHAPE)
    assert torch.equal(engines[0](inputs), engines[1](inputs))


def test_what_the_compiler_says_is_an_engine_error():
    class Untraceable(Toy):
        def forward(self, latents: Tensor, bias: Tensor) -> Tensor:
            torch._dynamo.graph_break("no words for it")
            return latents

    engine = InductorEngine(toy(Untraceable()))
    with pytest.raises(EngineError, match=r"(?s)toy at Shape.*could not be made ready for inductor: .*no words for it"):
        engine.prepare(SHAPE)
    assert not engine.holds(SHAPE)


def test_a_cuda_graph_on_a_cpu_is_an_engine_error():
    engine = GraphEngine(toy())
    with pytest.raises(EngineError, match="CUDA graphs need an NVIDIA GPU, and toy runs on cpu"):
        engine.prepare(SHAPE)
    assert not engine.holds(SHAPE)


def test_a_shape_that_the_unet_cannot_halve_is_refused():
    with pytest.raises(ValueError, match="multiple of 2"):
        InductorEngine(toy()).prepare(Shape(3, 5, 8))


@pytest.mark.parametrize("change", [{"latents": torch.zeros(3, 1, 4, 8)}, {"other": torch.zeros(1)}])
def test_inputs_of_another_call_are_refused(change: dict[str, Tensor]):
    engine = InductorEngine(toy())
    engine.prepare(SHAPE)
    with pytest.raises(ValueError, match=r"latents is|not the call's: other"):
        engine(random_inputs(engine.call, SHAPE) | change)
