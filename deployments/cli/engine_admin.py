"""What `reelray engines` does: the engines of the configured endpoints, and the plans on this machine's disk."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from deployments.hosting.demo_weights import write_missing_weights
from deployments.settings import Settings
from engines.errors import EngineError

if TYPE_CHECKING:
    from engines.backends.trt.cache import Entry, PlanCache

TOLERANCE: Mapping[str, float] = {"float64": 1e-4, "float32": 1e-3, "float16": 3e-2, "bfloat16": 2e-1}
"""The largest difference from the modules that is rounding, as a share of the largest value: an engine adds in another order."""


@dataclass(frozen=True)
class Made:
    """One call of one model. engine: what runs it. fault: why that is not the configured engine; "" if it is."""

    model: str
    call: str
    engine: str
    fault: str


@dataclass(frozen=True)
class Verified:
    """An engine compared with the modules. difference: see `PreparedEngines.differences`."""

    model: str
    call: str
    shape: str
    difference: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the difference is small enough to be rounding. NaN is not."""
        return self.difference <= self.tolerance


def build(settings: Settings) -> Iterator[Made]:
    """Makes every configured engine ready, as a replica does; what can be cached is then on disk for the replicas."""
    for model, stage in _stages(settings):
        for call, engine in stage.engines:
            yield Made(model, call, engine, "")
        for call, fault in stage.prepared.faults.items():
            yield Made(model, call, "eager", fault)


def verify(settings: Settings) -> Iterator[Verified | Made]:
    """Compares every configured engine with the modules on noise, or says why one is missing. Raises `EngineError`."""
    configs = settings.model_configs()
    for model, stage in _stages(settings):
        for call, fault in stage.prepared.faults.items():
            yield Made(model, call, "eager", fault)
        for call, shape, difference in stage.prepared.differences():
            text = f"{shape.frames} x {shape.height} x {shape.width}"
            yield Verified(model, call, text, difference, TOLERANCE[configs[model].dtype])


def plans(settings: Settings) -> list["Entry"]:
    """The plans in the engine folders of the configured endpoints, damaged files included."""
    return [entry for cache in _caches(settings) for entry in cache.entries()]


def inspect(settings: Settings, digest: str) -> dict[str, Any]:
    """A plan's key and, with TensorRT and a GPU, a report of its contents; else why there is none.

    digest: the first digits of the plan's digest are enough.
    Raises `EngineError` where there is no such plan, more than one, or a damaged one.
    """
    found = {entry.digest: (cache, entry) for cache in _caches(settings) for entry in cache.entries()}
    matching = [digest_ for digest_ in found if digest_.startswith(digest)]
    if len(matching) != 1:
        raise EngineError(f"{len(matching)} plans begin with {digest}")
    cache, entry = found[matching[0]]
    plan = None if entry.key is None else cache.load(entry.key)
    if entry.key is None or plan is None:
        raise EngineError(f"{entry.path} is damaged: it will be rebuilt when it is needed")
    about: dict[str, Any] = {"key": asdict(entry.key), "size_bytes": entry.size_bytes}
    try:
        from engines.backends.trt.inspection import report_of
        from engines.backends.trt.library import load_library

        return about | {"report": asdict(report_of(load_library("tensorrt"), plan))}
    except EngineError as exc:
        return about | {"report": None, "why": exc.message}


def _stages(settings: Settings) -> Iterator[tuple[str, Any]]:
    """The denoising stage of every model that has an engine configured."""
    from engines.registry import build_stage

    write_missing_weights(settings)
    for model, config in settings.model_configs().items():
        if config.engine.back_end != "eager":
            yield model, build_stage(model, "denoise", config)


def _caches(settings: Settings) -> "list[PlanCache]":
    from engines.backends.trt.cache import PlanCache

    folders = {config.engine.folder for config in settings.model_configs().values()}
    return [PlanCache(folder) for folder in sorted(folder for folder in folders if folder is not None and folder.is_dir())]
