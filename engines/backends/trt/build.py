"""Builds a plan from a graph, with TensorRT or TensorRT-RTX. No other file parses graphs or builds plans.

Both libraries have the same builder and parser. TensorRT proper is on no package index and needs a GPU to build. TensorRT-RTX
installs from PyPI and builds on any machine for the GPUs it knows (compute capabilities 7.5 to 12.1 without 9.0), so the steps
from UNet to plan are tested without a GPU and without TensorRT. Networks are strongly typed, so precision is the graph's; in
11.x they always are. `tensorrt-triton.md`, sections 2 and 3.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from engines.backends.trt.library import Messages, logger_of, note_faults, require_supported
from engines.backends.trt.plugin import register, require_plugins
from engines.backends.trt.profiles import Profile
from engines.errors import EngineError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildOptions:
    """What determines a plan besides graph and profiles; all of it must be part of a cache's key.

    refit: weights can be exchanged later (LoRA). optimization_level: 0 to 5; None is the library's own.
    workspace_bytes: the most that a kernel may use beside its tensors; None is all the GPU has. detailed: the plan's
    inspector reports each layer's kernel. compute_capability: builds for a GPU that is not present, e.g. "SM89";
    TensorRT-RTX only. plugins: our operations that replace the library's own layers, see `plugin.py`; TensorRT proper only.
    """

    refit: bool = False
    optimization_level: int | None = None
    workspace_bytes: int | None = None
    detailed: bool = True
    compute_capability: str | None = None
    plugins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Built:
    """plan: the serialised engine. timings: the builder's measurements, which shorten later builds; b"" if it made none."""

    plan: bytes
    timings: bytes


def build_plan(
    library: ModuleType,
    graph: Path,
    profiles: Sequence[Profile],
    options: BuildOptions = BuildOptions(),
    timings: bytes = b"",
) -> Built:
    """The serialised engine of an ONNX file, with one optimisation profile for each of `profiles`.

    timings: of an earlier build by this version for this GPU, or b"". Raises `EngineError`, with the library's own message, for
    an unsupported version, a graph that is not understood, profiles that do not fit it, or a build that fails. A graph with
    `options.plugins` must be exported for the one number of frames that its profiles have.
    """
    trt: Any = library
    require_supported(library, options.refit)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    if options.plugins:
        require_plugins(library, options.plugins)
        register()
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS)
    said = Messages()
    log = logger_of(library, said)
    with said.blamed_on("the builder cannot be made"):
        builder = trt.Builder(log)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        note_faults(parser, said)
        raise said.fault(f"{graph} cannot be read")
    _allow_decomposition(trt, network)
    config = builder.create_builder_config()
    _configure(trt, config, options)
    for profile in profiles:
        _add_profile(builder, config, network, profile, said)
    in_use = _use_timings(trt, config, timings)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise said.fault(f"{graph} cannot be built")
    measured = None if in_use is None else config.get_timing_cache().serialize()
    return Built(bytes(plan), b"" if measured is None else bytes(measured))


def _allow_decomposition(trt: Any, network: Any) -> None:
    """Lets an attention without a fused kernel (fp32, odd head widths) be split into simpler layers instead of failing."""
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # TensorRT's own way to get a layer's full interface
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


def _use_timings(trt: Any, config: Any, timings: bytes) -> Any:
    """The timing cache that the build uses and extends. It must live until the build's end. None for TensorRT-RTX.

    TensorRT-RTX measures nothing while it builds: its timing cache is deprecated and without effect since 1.2.
    """
    if trt.__name__ != "tensorrt":
        return None
    for stored in (timings, b""):
        cache = config.create_timing_cache(stored)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return cache
        logger.warning("a timing cache is refused", extra={"action": "timings_refused", "size_bytes": len(stored)})
    return None


def _add_profile(builder: Any, config: Any, network: Any, profile: Profile, said: Messages) -> None:
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
        raise said.fault("the profile is refused")
