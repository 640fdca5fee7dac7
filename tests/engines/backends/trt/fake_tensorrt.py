"""Stands in for the TensorRT library, to test our own logic: it computes `scaled.Scaled` on the CPU, with raw addresses.

It shows nothing about TensorRT. Its classes have the library's names, and `test_contract.py` checks that the real library has
each method here, so that code that passes with this fake at least calls functions that exist.
"""

import ctypes
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum, IntEnum
from functools import cache
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from engines.backends.shapes import ShapeFamily
from engines.backends.trt.export import OUTPUT
from engines.backends.trt.profiles import profile_of
from engines.backends.trt.stream import Launch
from engines.backends.unet_call import UNetCall

Severity = Enum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"])
TensorIOMode = Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
DataType = Enum("DataType", ["FLOAT", "HALF", "BF16"])
ExecutionContextAllocationStrategy = Enum("ExecutionContextAllocationStrategy", ["STATIC", "USER_MANAGED"])
LayerInformationFormat = Enum("LayerInformationFormat", ["ONELINE", "JSON"])
NetworkDefinitionCreationFlag = IntEnum("NetworkDefinitionCreationFlag", ["STRONGLY_TYPED", "PREFER_AOT_PYTHON_PLUGINS"], start=0)
ProfilingVerbosity = Enum("ProfilingVerbosity", ["LAYER_NAMES_ONLY", "DETAILED"])
BuilderFlag = Enum("BuilderFlag", ["REFIT"])
DTYPES = {torch.float32: "FLOAT", torch.float16: "HALF", torch.bfloat16: "BF16"}
CUDA_TYPES = {"FLOAT": "<f4", "HALF": "<f2"}
MEMORY_BYTES = 64


class FakeStream:
    """Runs work at once. A capture keeps shapes, addresses and weights as they were, as a CUDA graph may do in the worst case."""

    known: ClassVar[dict[int, "FakeStream"]] = {}

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.handle = 1000 + len(self.known)
        self.known[self.handle] = self
        self.depth = 0
        self.captures = 0
        self.tape: list[Launch] | None = None

    @contextmanager
    def entered(self) -> Iterator[None]:
        self.depth += 1
        yield
        self.depth -= 1

    def captured(self, launch: Launch) -> Launch:
        launch()
        self.tape, self.captures = [], self.captures + 1
        launch()
        tape, self.tape = self.tape, None

        def replay() -> None:
            for work in tape or ():
                work()

        return replay

    def synchronize(self) -> None:
        pass

    def enqueue(self, work: Launch) -> None:
        assert self.depth, "enqueued outside of `entered`"
        work() if self.tape is None else self.tape.append(work)


class ILogger:
    Severity = Severity

    def __init__(self) -> None:
        pass

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self.hidden_log = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> "ICudaEngine | None":
        try:
            plan = json.loads(serialized_engine)
        except ValueError:
            self.hidden_log.log(Severity.ERROR, "magic tag does not match")
            return None
        return ICudaEngine(plan, self.hidden_log)


class ICudaEngine:
    def __init__(self, plan: dict[str, Any], log: ILogger) -> None:
        self.hidden_plan, self.hidden_log = plan, log
        self.hidden_weight = plan["weight"]
        self.hidden_contexts: list[IExecutionContext] = []
        self.num_io_tensors = len(plan["tensors"])
        self.num_optimization_profiles = len(plan["profiles"])
        self.refittable = plan["refittable"]
        self.device_memory_size_v2 = MEMORY_BYTES

    def get_tensor_name(self, index: int) -> str:
        return list(self.hidden_plan["tensors"])[index]

    def get_tensor_mode(self, name: str) -> Any:
        return TensorIOMode[self.hidden_plan["tensors"][name][0]]

    def get_tensor_dtype(self, name: str) -> Any:
        return DataType[self.hidden_plan["tensors"][name][1]]

    def get_tensor_shape(self, name: str) -> list[int]:
        return self.hidden_plan["tensors"][name][2]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        return self.hidden_plan["profiles"][profile_index][name]

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return MEMORY_BYTES

    def create_execution_context(self, strategy: Any) -> "IExecutionContext":
        assert strategy == ExecutionContextAllocationStrategy.USER_MANAGED
        context = IExecutionContext(self)
        self.hidden_contexts.append(context)
        return context

    def create_engine_inspector(self) -> "EngineInspector":
        return EngineInspector(self.hidden_plan["report"])


class EngineInspector:
    def __init__(self, report: str) -> None:
        self.hidden_report = report

    def get_engine_information(self, format: Any) -> str:  # noqa: A002  (the library's name)
        assert format == LayerInformationFormat.JSON
        return self.hidden_report


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self.hidden_engine = engine
        self.hidden_profile: int | None = None
        self.hidden_memory = 0
        self.hidden_shapes: dict[str, tuple[int, ...]] = {}
        self.hidden_addresses: dict[str, int] = {}
        self.hidden_changes = 0

    def set_device_memory(self, memory: int, size: int) -> None:
        self.hidden_memory = size
        self.hidden_changes += 1

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self.hidden_profile = profile_index
        self.hidden_changes += 1
        return profile_index < self.hidden_engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.hidden_profile is not None
        ranges = self.hidden_engine.hidden_plan["profiles"][self.hidden_profile].get(name)
        if "shape" in self.hidden_engine.hidden_plan["faults"] or (
            ranges and not all(a <= n <= b for a, n, b in zip(ranges[0], shape, ranges[2], strict=True))
        ):
            self.hidden_engine.hidden_log.log(Severity.ERROR, f"{name} does not satisfy the profile")
            return False
        self.hidden_shapes[name] = shape
        self.hidden_changes += 1
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.hidden_addresses[name] = memory
        self.hidden_changes += 1
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert name == OUTPUT
        return self.hidden_shapes["latents"]

    def execute_async_v3(self, stream_handle: int) -> bool:
        plan = self.hidden_engine.hidden_plan
        if "execute" in plan["faults"]:
            self.hidden_engine.hidden_log.log(Severity.ERROR, "out of registers")
            return False
        assert self.hidden_memory >= MEMORY_BYTES
        assert set(self.hidden_addresses) == set(plan["tensors"])
        shapes = {**self.hidden_shapes, OUTPUT: self.hidden_shapes["latents"]}
        places = {name: (self.hidden_addresses[name], shapes[name], plan["tensors"][name][1]) for name in shapes}
        weight = self.hidden_engine.hidden_weight
        see = at if stream_handle in FakeStream.known else at_cuda

        changes = self.hidden_changes

        def work() -> None:
            assert changes == self.hidden_changes, "a context was changed after its work was captured in a graph"
            tensors = {name: see(*place) for name, place in places.items()}
            tensors[OUTPUT].copy_(tensors["latents"] * weight + tensors["time"].sum() + tensors["skip_0"].mean())

        if stream_handle in FakeStream.known:
            FakeStream.known[stream_handle].enqueue(work)
        else:  # a CUDA stream, which is PyTorch's current stream now
            work()
        return True


class Refitter:
    def __init__(self, engine: ICudaEngine, logger: ILogger) -> None:
        self.hidden_engine = engine
        self.hidden_weight: float | None = None

    def get_missing_weights(self) -> list[str]:
        return ["weight"] if self.hidden_weight is None else []

    def refit_cuda_engine_async(self, stream_handle: int) -> bool:
        if "refit" in self.hidden_engine.hidden_plan["faults"]:
            self.hidden_engine.hidden_log.log(Severity.ERROR, "validation failed")
            return False
        self.hidden_engine.hidden_weight = self.hidden_weight
        return True


class OnnxParserRefitter:
    """Reads "ONNX files" that hold a number (the weight) or a plan of this fake; fails for others."""

    def __init__(self, refitter: Refitter, logger: ILogger) -> None:
        self.hidden_refitter = refitter
        self.num_errors = 0

    def refit_from_file(self, model: str) -> bool:
        try:
            held = json.loads(Path(model).read_text())
            self.hidden_refitter.hidden_weight = held["weight"] if isinstance(held, dict) else float(held)
        except ValueError:
            self.num_errors = 1
            return False
        return True

    def get_error(self, index: int) -> str:
        return "no number"


class Builder:
    def __init__(self, logger: ILogger) -> None:
        pass

    def create_network(self, flags: int) -> "INetworkDefinition":
        return INetworkDefinition(flags)

    def create_optimization_profile(self) -> "IOptimizationProfile":
        return IOptimizationProfile()

    def create_builder_config(self) -> "IBuilderConfig":
        return IBuilderConfig()

    def build_serialized_network(self, network: "INetworkDefinition", config: "IBuilderConfig") -> bytes:
        assert config.hidden_cache is not None
        config.hidden_cache.hidden_timings += b"+"
        given = {"profiles": config.hidden_profiles, "refittable": config.hidden_refit, "flags": network.hidden_flags}
        plan = network.hidden_plan | given
        return json.dumps(plan).encode()


class ITensor:
    def __init__(self, name: str, shape: Sequence[int]) -> None:
        self.name, self.shape = name, shape


class INetworkDefinition:
    num_layers = 0
    num_inputs = 0

    def __init__(self, flags: int) -> None:
        self.hidden_flags = flags
        self.hidden_plan: dict[str, Any] = {}

    def get_input(self, index: int) -> ITensor:
        inputs = [(name, shape) for name, (mode, _, shape) in self.hidden_plan["tensors"].items() if mode == "INPUT"]
        return ITensor(*inputs[index])


class OnnxParser:
    """Reads "ONNX files" that are plans of this fake without their profiles."""

    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self.hidden_network = network

    def parse_from_file(self, model: str) -> bool:
        plan = self.hidden_network.hidden_plan = json.loads(Path(model).read_text())
        self.hidden_network.num_inputs = len(plan["tensors"]) - 1
        return True


class IOptimizationProfile:
    def __init__(self) -> None:
        self.hidden_ranges: dict[str, Any] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:  # noqa: A002  (the library's names)
        self.hidden_ranges[input] = [min, opt, max]


class IBuilderConfig:
    """How the real library refuses unusable timings was not tried, so this fake has both ways: returning None and False."""

    def __init__(self) -> None:
        self.hidden_cache: ITimingCache | None = None
        self.hidden_profiles: list[dict[str, Any]] = []
        self.hidden_refit = False
        self.profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY

    def set_flag(self, flag: Any) -> None:
        self.hidden_refit = flag == BuilderFlag.REFIT

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self.hidden_profiles.append(profile.hidden_ranges)
        return len(self.hidden_profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> "ITimingCache | None":
        return None if serialized_timing_cache == b"unreadable" else ITimingCache(serialized_timing_cache)

    def get_timing_cache(self) -> "ITimingCache | None":
        return self.hidden_cache

    def set_timing_cache(self, cache: "ITimingCache", ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.hidden_cache = cache
        return cache.hidden_timings != b"of another GPU"


class ITimingCache:
    def __init__(self, timings: bytes) -> None:
        self.hidden_timings = timings

    def serialize(self) -> bytes:
        return self.hidden_timings


def at(address: int, shape: Sequence[int], dtype: str) -> Tensor:
    """The memory at an address as a tensor."""
    torch_dtype = next(key for key, name in DTYPES.items() if name == dtype)
    size_bytes = prod(shape) * torch_dtype.itemsize
    return torch.frombuffer((ctypes.c_char * size_bytes).from_address(address), dtype=torch_dtype).view(*shape)


@cache
def at_cuda(address: int, shape: tuple[int, ...], dtype: str) -> Tensor:
    """The same for GPU memory. Cached, because the driver must not be asked about an address while work is captured."""

    class Place:
        __cuda_array_interface__ = {"shape": tuple(shape), "typestr": CUDA_TYPES[dtype], "data": (address, False), "version": 3}  # noqa: RUF012

    return torch.as_tensor(Place(), device="cuda")


def fake_tensorrt(version: str = "11.4.0.106") -> ModuleType:
    """The fake as a module with the library's name."""
    module = ModuleType("tensorrt")
    vars(module).update({name: value for name, value in globals().items() if isinstance(value, type)}, __version__=version)
    return module


def fake_plan(
    call: UNetCall,
    families: Sequence[ShapeFamily],
    weight: float = 2.0,
    refittable: bool = False,
    report: str = "{}",
    faults: Sequence[str] = (),
) -> dict[str, Any]:
    """A plan of the fake, for JSON: all that our code asks about. faults: calls that fail, "shape", "execute" or "refit"."""
    tensors = {
        name: ["INPUT", DTYPES[tensor.dtype], [-1 if isinstance(dim, str) else dim for dim in call.dims[name]]]
        for name, tensor in call.example.items()
    }
    tensors[OUTPUT] = ["OUTPUT", *tensors["latents"][1:]]
    profiles = [{name: [r.smallest, r.best, r.largest] for name, r in profile_of(call, f).items()} for f in families]
    return {
        "tensors": tensors,
        "profiles": profiles,
        "weight": weight,
        "refittable": refittable,
        "report": report,
        "faults": list(faults),
    }
