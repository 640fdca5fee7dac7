"""From a graph to a plan: the one place that parses and builds, with TensorRT or with TensorRT-RTX.

Both have the same builder and parser. TensorRT proper is on no package index and needs a GPU to build; TensorRT-RTX installs
from PyPI and builds on any machine for the GPUs it knows (compute capabilities 7.5 to 12.1 without 9.0), so that the way
from UNet to plan is tested where neither is at hand. Precision is the graph's: networks are strongly typed, which 11.x
always is. `tensorrt-triton.md`, sections 2 and 3.
"""

import importlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from engines.errors import EngineError
from engines.trt.profiles import Profile

logger = logging.getLogger(__name__)

Library = Literal["tensorrt", "tensorrt_rtx"]


@dataclass(frozen=True)
class BuildOptions:
    """What shapes a plan beside graph and profiles; all of it belongs into a cache's key.

    refit: weights can be exchanged later (LoRA). optimization_level: 0 to 5; None is the library's own.
    workspace_bytes: the most that a kernel may use beside its tensors; None is all the GPU has. detailed: the plan's
    inspector tells each layer's kernel. compute_capability: a GPU that is not here, as "SM89"; TensorRT-RTX only.
    """

    refit: bool = False
    optimization_level: int | None = None
    workspace_bytes: int | None = None
    detailed: bool = True
    compute_capability: str | None = None


def load_library(name: Library) -> ModuleType:
    """The module of that name. Raises `EngineError` where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as exc:
        raise EngineError(f"{name} cannot be imported: {exc}") from exc


def build_plan(library: ModuleType, graph: Path, profiles: Sequence[Profile], options: BuildOptions = BuildOptions()) -> bytes:
    """The serialised engine of an ONNX file, with one optimisation profile for each of `profiles`.

    Raises `EngineError` for a graph that is not understood, profiles that do not fit it, or a build that fails; the
    library's own words are in it.
    """
    trt: Any = library
    said = _Messages()
    log = _logger(trt, said)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        faults = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise EngineError(f"{graph} cannot be read: {faults or said.last()}")
    _allow_decomposition(trt, network)
    config = builder.create_builder_config()
    _configure(trt, config, options)
    for profile in profiles:
        _add_profile(builder, config, network, profile, said)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"{graph} cannot be built: {said.last()}")
    return bytes(plan)


def _allow_decomposition(trt: Any, network: Any) -> None:
    """An attention for which there is no fused kernel (fp32, odd head widths) becomes its parts instead of an error."""
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # TensorRT's own way to a layer's full interface
            layer.attention.decomposable = True


def _configure(trt: Any, config: Any, options: BuildOptions) -> None:
    verbosity = trt.ProfilingVerbosity
    config.profiling_verbosity = verbosity.DETAILED if options.detailed else verbosity.LAYER_NAMES_ONLY
    if options.refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.compute_capability is not None:
        known = getattr(trt, "ComputeCapability", None)
        capability = getattr(known, options.compute_capability, None)
        if capability is None:
            raise EngineError(f"{trt.__name__} {trt.__version__} cannot build for {options.compute_capability} from elsewhere")
        config.num_compute_capabilities = 1
        config.set_compute_capability(capability, 0)


def _add_profile(builder: Any, config: Any, network: Any, profile: Profile, said: "_Messages") -> None:
    inputs = {network.get_input(i).name: network.get_input(i) for i in range(network.num_inputs)}
    changing = {name for name, tensor in inputs.items() if -1 in tensor.shape}
    if changing != set(profile):
        raise EngineError(f"the profile is for {sorted(profile)}, the graph's changing inputs are {sorted(changing)}")
    made = builder.create_optimization_profile()
    for name, shapes in profile.items():
        declared = tuple(inputs[name].shape)
        for shape in (shapes.smallest, shapes.best, shapes.largest):
            if len(shape) != len(declared) or any(d not in (-1, n) for d, n in zip(declared, shape, strict=True)):
                raise EngineError(f"{name} is {declared} in the graph; the profile says {shape}")
        try:
            made.set_shape(name, shapes.smallest, shapes.best, shapes.largest)
        except (ValueError, RuntimeError, TypeError) as exc:
            raise EngineError(f"the profile of {name} is refused: {shapes}") from exc
    if not made or config.add_optimization_profile(made) < 0:
        raise EngineError(f"the profile is refused: {said.last()}")


class _Messages:
    """What the library said, for errors that only come as a None."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def last(self) -> str:
        return "; ".join(self.errors[-3:]) or "the library gave no reason"


def _logger(trt: Any, said: _Messages) -> Any:
    levels = trt.ILogger.Severity

    class Log(trt.ILogger):  # type: ignore[misc]  # a class of the library that was chosen
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            if severity in (levels.ERROR, levels.INTERNAL_ERROR):
                said.errors.append(message)  # and raised
            elif severity == levels.WARNING:
                logger.warning("TensorRT says", extra={"action": "tensorrt", "text": message})

    return Log()
