"""Introspection of the real TensorRT bindings, which are on PyPI without the library: do the names that we use exist in them?

TensorRT itself does not run. The extension module is loaded over empty libraries, and its names, enumerations and signatures
are read; every use of the library in our sources is compared with them. Only `test_gpu.py`, which needs a GPU, shows whether
the functions do what we expect. Tried by hand once: the bindings of 10.16.0, 10.16.1 and 11.0 to 11.3 also offer all of it.
"""

import inspect
import json
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from tests.engines.backends.trt import fake_tensorrt
from tests.engines.backends.trt.api_use import ApiUse, members, parsed
from tests.engines.backends.trt.bindings import empty_libraries, with_bindings

PINNED = "11.4.0.106"
SOURCES = [Path(f"engines/backends/trt/{name}.py") for name in ("library", "build", "runner", "inspection")]
RTX_ONLY = {"num_compute_capabilities", "set_compute_capability"}
"""Used only where `ComputeCapability` exists; TensorRT proper does not have it."""


@pytest.fixture(scope="session")
def classes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    libraries = empty_libraries(tmp_path_factory.mktemp("empty"), "the names we use exist in TensorRT's bindings")
    offered = json.loads(with_bindings(libraries, "dump_bindings.py"))
    assert offered["version"] == PINNED
    return offered["classes"]


@pytest.fixture(scope="session")
def use(classes: dict[str, Any]) -> ApiUse:
    return ApiUse(classes, SOURCES)


def test_introspection_every_name_and_argument_that_we_use_exists_in_the_bindings(use: ApiUse):
    faults = [fault for fault in use.faults if not any(name in fault for name in RTX_ONLY)]
    assert not faults


def test_introspection_follows_our_sources_through_all_that_they_make(use: ApiUse):
    """Otherwise the test above could pass by checking nothing."""
    made = {"Builder", "IBuilderConfig", "INetworkDefinition", "IOptimizationProfile", "OnnxParser", "ITimingCache", "ITensor"}
    run = {"Runtime", "ICudaEngine", "IExecutionContext", "EngineInspector", "Refitter", "OnnxParserRefitter"}
    assert made | run <= {kind for kind, _ in use.checked}
    assert len(use.checked) >= 60
    assert ("IExecutionContext", "execute_async_v3") in use.checked
    assert ("ExecutionContextAllocationStrategy", "USER_MANAGED") in use.checked
    assert ("NetworkDefinitionCreationFlag", "PREFER_AOT_PYTHON_PLUGINS") in use.checked


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("runtime = trt.Runtme(log)", "no class Runtme"),
        ("runtime = trt.Runtime()", "does not take"),
        ("runtime = trt.Runtime(log)\nruntime.deserialize_engine(plan)", "Runtime has no deserialize_engine"),
        ("engine = trt.Runtime(log).deserialize_cuda_engine(plan)\nengine.get_tensor_name(0, 1)", "does not take"),
        ("engine = trt.Runtime(log).deserialize_cuda_engine(plan)\nengine.get_tensor_name(number=0)", "does not take"),
        ("engine = trt.Runtime(log).deserialize_cuda_engine(plan)\nengine.refittable = True", "cannot be set"),
        ("flag = trt.BuilderFlag.FP16", "class BuilderFlag has no FP16"),
        ("levels = trt.ILogger.Severity\nlevels.FATAL", "has no FATAL"),
        ("thing.execute_async_v3(0)", "of something unknown"),
    ],
)
def test_introspection_finds_what_does_not_exist(classes: dict[str, Any], source: str, words: str):
    (fault,) = ApiUse(classes, [source]).faults
    assert words in fault


def test_introspection_the_fake_library_has_no_method_that_the_bindings_have_not(classes: dict[str, Any]):
    fakes = [value for value in vars(fake_tensorrt).values() if isinstance(value, type) and value.__name__ in classes]
    assert len(fakes) >= 20
    for kind, name, value in members(fakes):
        offered = classes[kind]["members"]
        assert name in offered, f"{kind} has no {name}"
        if inspect.isfunction(value):
            names = tuple(inspect.signature(value).parameters)[1:]
            real = [parsed(text) for text in offered[name]["signatures"]]
            assert any(names == s.names[: len(names)] and len(names) >= s.required for s in real), f"{kind}.{name}{names}"


def test_introspection_the_names_of_data_types_are_the_bindings(classes: dict[str, Any]):
    from engines.backends.trt.runner import _DTYPES

    assert set(_DTYPES) <= set(classes["DataType"]["members"])
    assert issubclass(fake_tensorrt.DataType, Enum)
