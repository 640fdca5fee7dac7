"""A UNet's engines, made ready before the first request, and the modules themselves where there is none.

A missing engine, a failing one, or one without the shape costs speed and never a job: the call runs eagerly. So that this is
noticed, the log tells each case once, and every result names what computed it.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import perf_counter

import torch
from torch import Tensor

from engines.backends.backend import Eager, Engine
from engines.backends.config import EngineConfig
from engines.backends.cuda_graph import GraphEngine
from engines.backends.exact_shapes import ExactShapes
from engines.backends.inductor import InductorEngine
from engines.backends.shapes import Shape, ShapeFamily
from engines.backends.unet_call import UNetCall
from engines.errors import EngineError
from engines.spec import CallEngines

logger = logging.getLogger(__name__)


class PreparedEngines:
    """Engines by the name of their call. calls: asked for only if there is anything to prepare.

    families: the shapes to prepare. faults: by call, why it has no engine. Does not raise: see above.
    """

    def __init__(
        self, config: EngineConfig, calls: Callable[[], Sequence[UNetCall]], families: Sequence[ShapeFamily], device: str
    ):
        self.back_end, self.families = config.back_end, families
        self.faults: dict[str, str] = {}
        self._engines: dict[str, Engine] = {}
        self._calls: dict[str, UNetCall] = {}
        self._missed: set[tuple[str, Shape]] = set()
        if config.back_end == "eager":
            return
        for call in calls():
            started = perf_counter()
            fields = {"engine": config.back_end, "call": call.name, "families": len(families)}
            try:
                self.add(call, load_engine(config, call, families, torch.device(device)))
            except (EngineError, OSError, RuntimeError) as exc:  # a full disk, a full GPU
                fault = exc.message if isinstance(exc, EngineError) else f"{type(exc).__name__}: {exc}"
                self.faults[call.name] = fault
                logger.error("no engine: eager runs instead", extra={"action": "engine_missing", **fields, "error": fault})
            else:
                fields["seconds"] = round(perf_counter() - started, 1)
                logger.info("engine is ready", extra={"action": "engine_ready", **fields})

    def add(self, call: UNetCall, engine: Engine) -> None:
        """From now on `engine` runs this call, in place of another that may have."""
        self._calls[call.name], self._engines[call.name] = call, engine

    @property
    def by_call(self) -> CallEngines:
        """Every call that has an engine, and which."""
        return tuple((call, engine.name) for call, engine in sorted(self._engines.items()))

    def differences(self) -> Iterator[tuple[str, Shape, float]]:
        """Every call that has an engine, at the families' best shapes it takes: how far it is from the modules on the same noise.

        That is the largest difference as a share of the largest value. Raises `EngineError` for an engine that fails.
        """
        for name, engine in self._engines.items():
            call = self._calls[name]
            for shape in filter(engine.holds, dict.fromkeys(family.best for family in self.families)):
                inputs = _noise(call, shape)
                with torch.inference_mode():
                    expected = Eager(call)(inputs).double()
                    apart = (engine(inputs).double() - expected).abs().max() / expected.abs().max()
                yield name, shape, apart.item()

    def call(
        self, name: str, shape: Shape, inputs: Callable[[], Mapping[str, Tensor]], eager: Callable[[], Tensor]
    ) -> tuple[Tensor, str]:
        """The result, and the name of the engine that gave it. inputs: of the call `name`; eager: the same by the modules."""
        engine = self._engines.get(name)
        if engine is not None and engine.holds(shape):
            try:
                return engine(inputs()), engine.name
            except (EngineError, ValueError) as exc:  # `ValueError` for inputs of another call
                del self._engines[name]
                fields = {"action": "engine_failed", "engine": engine.name, "call": name, "error": str(exc)}
                logger.error("an engine has failed: eager runs from now on", extra=fields)
            except RuntimeError as exc:  # of the device, above all its memory, which may be free again at the next call
                fields = {
                    "action": "engine_call_failed",
                    "engine": engine.name,
                    "call": name,
                    "error": f"{type(exc).__name__}: {exc}",
                }
                logger.warning("an engine has failed: eager runs this call", extra=fields)
        elif self.back_end != "eager" and (name, shape) not in self._missed:
            self._missed.add((name, shape))
            fields = {"action": "engine_unprepared", "engine": self.back_end, "call": name, "shape": str(shape)}
            logger.warning("no engine for a shape: eager runs instead", extra=fields)
        return eager(), "eager"


def _noise(call: UNetCall, shape: Shape) -> dict[str, Tensor]:
    """Inputs of the call's kind, always the same."""
    generator = torch.Generator().manual_seed(0)
    sizes = call.shapes(shape)
    return {name: torch.randn(sizes[name], generator=generator).to(tensor) for name, tensor in call.example.items()}


def load_engine(config: EngineConfig, call: UNetCall, families: Sequence[ShapeFamily], device: torch.device) -> Engine:
    """The call's engine, built if need be. Raises `EngineError`."""
    try:
        for family in families:
            for shape in (family.smallest, family.best, family.largest):
                call.shapes(shape)
    except ValueError as exc:
        raise EngineError(f"the shapes do not fit: {exc}") from exc
    if config.back_end == "tensorrt":
        return _tensorrt(config, call, families, device)
    return _exact(GraphEngine(call) if config.back_end == "cuda_graph" else InductorEngine(call), families)


def _exact(engine: ExactShapes, families: Sequence[ShapeFamily]) -> Engine:
    """Ready for every family of one shape. Of a wider one no shape is likelier than another, and each takes minutes."""
    for shape in dict.fromkeys(family.best for family in families if family.smallest == family.largest):
        engine.prepare(shape)
    return engine


def _tensorrt(config: EngineConfig, call: UNetCall, families: Sequence[ShapeFamily], device: torch.device) -> Engine:
    from engines.backends.trt.build import BuildOptions
    from engines.backends.trt.cache import PlanCache
    from engines.backends.trt.gpu import gpu_of
    from engines.backends.trt.library import load_library
    from engines.backends.trt.plans import load_engine as load_plan
    from engines.backends.trt.stream import CudaStream

    if device.type != "cuda":
        raise EngineError(f"TensorRT needs an NVIDIA GPU, and the model runs on {device}")
    if config.folder is None:
        raise EngineError("no folder was named for TensorRT's plans")
    library, cache, options = (
        load_library("tensorrt"),
        PlanCache(config.folder),
        BuildOptions(refit=config.refit, plugins=config.plugins),
    )
    return load_plan(call, families, library, cache, CudaStream(device), gpu_of(device), options)
