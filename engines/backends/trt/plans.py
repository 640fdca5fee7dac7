"""The plan of a UNet call: found in the cache, or else exported and built.

An export takes up to a minute, so a replica whose plan is cached must not need one. Therefore the key is not made from the ONNX
file but from its sources: our source files that are traced or do the tracing, the versions of the tracing packages, the call's
shapes, and the module's layers with their settings and weights. Hashing 2.5 GB of weights takes some seconds.
"""

import ast
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import cache as once
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from engines.backends.shapes import ShapeFamily
from engines.backends.trt import build, export, plugin, profiles, ptx
from engines.backends.trt.build import BuildOptions, build_plan
from engines.backends.trt.cache import REFITTABLE, Gpu, PlanCache, PlanKey
from engines.backends.trt.export import export_onnx
from engines.backends.trt.plugin import frames_of
from engines.backends.trt.profiles import profile_of
from engines.backends.trt.runner import TensorRTEngine
from engines.backends.trt.stream import Stream
from engines.backends.unet_call import UNetCall
from engines.checkpoints.fingerprint import fingerprint_of
from engines.errors import EngineError
from engines.temporary import temporary_folder

logger = logging.getLogger(__name__)

TRACERS = ("torch", "diffusers", "onnxscript", "onnx-ir", "onnx")
"""Distributions whose version can change the graph of a module."""

_ROOT = Path(__file__).parents[3]
_OURS = ("engines", "kernels")


def load_engine(
    call: UNetCall,
    families: Sequence[ShapeFamily],
    library: ModuleType,
    cache: PlanCache,
    stream: Stream,
    gpu: Gpu,
    options: BuildOptions,
) -> TensorRTEngine:
    """The call's engine with the module's weights, from a cached or new plan. gpu: that of `stream`, see `gpu_of`.

    With `options.refit` the plan may hold other weights, so the module is always exported and its weights replace the plan's.
    Raises `EngineError`.
    """
    with _exporting(call, families, library, options) as graph, stream.entered():
        plan = _found_or_built(call, families, library, cache, gpu, options, graph)
        engine = TensorRTEngine(plan, library, call, families, stream)
        if options.refit:
            engine.refit(graph())
    return engine


def plan_of(
    call: UNetCall,
    families: Sequence[ShapeFamily],
    library: ModuleType,
    cache: PlanCache,
    gpu: Gpu,
    options: BuildOptions,
) -> bytes:
    """The plan, built now on the current GPU if it is not in `cache`. With `options.refit` it may hold other weights.

    Raises `EngineError`.
    """
    with _exporting(call, families, library, options) as graph:
        return _found_or_built(call, families, library, cache, gpu, options, graph)


def plan_key(call: UNetCall, families: Sequence[ShapeFamily], library: ModuleType, gpu: Gpu, options: BuildOptions) -> PlanKey:
    """The key of the plan. Raises `EngineError` if the exporter is not installed, as its version is part of the key."""
    trt: Any = library
    return PlanKey(
        library=trt.__name__,
        version=trt.__version__,
        gpu=gpu,
        graph=_graph_hash(call),
        weights=REFITTABLE if options.refit else _weights_hash(call.module),
        precision=str(call.example["latents"].dtype).removeprefix("torch."),
        profiles=tuple(repr(family) for family in families),
        plugins=_sources_hash(tuple(sorted((_ROOT / "kernels").rglob("*.py")))),
        triton=_version("triton", missing="none"),
        flags=tuple(f"{field.name}={getattr(options, field.name)}" for field in fields(options)),
    )


def _found_or_built(
    call: UNetCall,
    families: Sequence[ShapeFamily],
    library: ModuleType,
    cache: PlanCache,
    gpu: Gpu,
    options: BuildOptions,
    graph: Callable[[], Path],
) -> bytes:
    key = plan_key(call, families, library, gpu, options)

    def built() -> bytes:
        logger.info("an engine is built", extra={"action": "engine_build", "call": call.name, "gpu": gpu.name})
        made = build_plan(library, graph(), [profile_of(call, f) for f in families], options, cache.timings(key.timings))
        if made.timings:
            cache.keep_timings(key.timings, made.timings)
        return made.plan

    return cache.get(key, built)


@contextmanager
def _exporting(
    call: UNetCall, families: Sequence[ShapeFamily], library: ModuleType, options: BuildOptions
) -> Iterator[Callable[[], Path]]:
    """A function that gives the call's ONNX file. The first call exports it to a temporary folder, as it may be gigabytes.

    Raises `EngineError` at once for plugins that cannot be used.
    """
    frames = frames_of(library, options.plugins, families, call.example["latents"].dtype)
    with temporary_folder() as folder:
        path = folder / f"{call.name}.onnx"

        def graph() -> Path:
            if not path.exists():
                export_onnx(call, path, options.plugins, frames)
            return path

        yield graph


def _graph_hash(call: UNetCall) -> str:
    roots = (type(call.module).__module__, export.__name__)
    sources = {*_imported(roots), *(_file(module.__name__) for module in (build, plugin, profiles, ptx))}
    inputs = tuple((name, dims, str(call.example[name].dtype)) for name, dims in call.dims.items())
    versions = tuple((name, _version(name)) for name in TRACERS)
    return fingerprint_of(
        _sources_hash(tuple(sorted(sources))), versions, call.name, inputs, call.multiple, _settings(call.module)
    )


def _imported(roots: Sequence[str]) -> Iterator[Path]:
    """Our source files that these modules import, directly or not, including the modules themselves."""
    seen, waiting = set[str](), [*roots]
    while waiting:
        name = waiting.pop()
        path = _file(name)
        if name in seen or not name.startswith(_OURS) or not path.is_file():
            continue
        seen.add(name)
        yield path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):  # absolute imports only; an imported name may be a value or a module
                waiting += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]


def _file(module: str) -> Path:
    return _ROOT.joinpath(*module.split(".")).with_suffix(".py")


@once
def _sources_hash(paths: tuple[Path, ...]) -> str:
    """The hash of these files' contents. Read once per process, because modules are also imported only once."""
    return fingerprint_of({str(path.relative_to(_ROOT)): path.read_bytes() for path in paths})


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """Every layer's class and plain attributes: heads, strides, groups. They shape the graph but are not in a state dict."""
    return tuple(
        (name, _plain(type(layer)), tuple((key, _plain(value)) for key, value in sorted(vars(layer).items()) if key[0] != "_"))
        for name, layer in module.named_modules()
    )


def _plain(value: Any) -> Any:
    """A value that can be fingerprinted: for a function its name, for an object the name of its class."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, tuple | list):
        return tuple(_plain(item) for item in value)
    if isinstance(value, dict):
        return tuple(sorted((str(key), _plain(item)) for key, item in value.items()))
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def _weights_hash(module: nn.Module) -> str:
    """The hash of parameters, buffers (including those that are not in checkpoints) and tensors that are plain attributes."""
    tensors = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers(remove_duplicate=False))}
    for name, layer in module.named_modules():
        tensors |= {f"{name}.{key}": value for key, value in vars(layer).items() if isinstance(value, Tensor)}
    return fingerprint_of(tensors)


def _version(distribution: str, missing: str | None = None) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError as exc:
        if missing is not None:
            return missing
        raise EngineError(f"{distribution} is not installed, and an engine needs it: pip install 'reelray[gpu]'") from exc
