"""A readable report of an engine: its layers with their kernels, its inputs and outputs, its memory."""

import json
import logging
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from engines.backends.trt.library import Messages, logger_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layer:
    """A layer of the engine, which may combine several of the graph's. kind, tactic: "" in a plan built without details."""

    name: str
    kind: str
    tactic: str


@dataclass(frozen=True)
class Port:
    """An input or output. mode: "INPUT" or "OUTPUT". dtype: TensorRT's name. shape: -1 is a size that may change."""

    name: str
    mode: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """version: of the library. memory_bytes: what activations need in each profile. layers: empty if none is reported."""

    version: str
    refittable: bool
    layers: tuple[Layer, ...]
    ports: tuple[Port, ...]
    memory_bytes: tuple[int, ...]


def report_of(library: ModuleType, plan: bytes) -> Report:
    """The report of a plan. Needs a GPU of the kind that the plan was built for. Raises `EngineError` if it cannot be loaded."""
    trt: Any = library
    said = Messages()
    log = logger_of(library, said)
    with said.blamed_on("the runtime cannot be made"):
        runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise said.fault("the plan cannot be loaded")
    return inspect(library, engine)


def inspect(library: ModuleType, engine: Any) -> Report:
    """The report of an `ICudaEngine`. Inputs and outputs are queried one by one, as 11.0 renamed them in the report."""
    trt: Any = library
    inspector = engine.create_engine_inspector()
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    return Report(
        version=trt.__version__,
        refittable=engine.refittable,
        layers=layers_of(inspector.get_engine_information(trt.LayerInformationFormat.JSON)),
        ports=tuple(
            Port(
                name, engine.get_tensor_mode(name).name, engine.get_tensor_dtype(name).name, tuple(engine.get_tensor_shape(name))
            )
            for name in names
        ),
        memory_bytes=tuple(engine.get_device_memory_size_for_profile_v2(i) for i in range(engine.num_optimization_profiles)),
    )


def layers_of(text: str) -> tuple[Layer, ...]:
    """The layers of an inspector's report in JSON: objects, or in a plan without details only names.

    The report's fields are not guaranteed: an absent one becomes "". A report that cannot be read is logged and gives no layers.
    """
    try:
        report = json.loads(text)
    except ValueError as exc:
        logger.warning("an engine's report cannot be read", extra={"action": "report_unread", "error": str(exc)})
        return ()
    found = report.get("Layers") if isinstance(report, dict) else None
    return tuple(_layer(about) for about in found or ())


def _layer(about: Any) -> Layer:
    if not isinstance(about, dict):
        return Layer(str(about), "", "")
    tactic = about.get("TacticName") or about.get("TacticValue") or ""
    return Layer(str(about.get("Name", "")), str(about.get("LayerType", "")), str(tactic))
