"""Calls our plugins through TensorRT's own Python package, as its builder would, and writes what the package gets, as JSON.

`tensorrt.plugin` is the real Python code: it checks our annotations, calls our functions and checks what they return. Its C++
side is missing: the registry, the dimensions and their arithmetic are stand-ins, and the order of calls was read from that
package. Runs in a process whose library path leads to empty libraries. Arguments: compute capability, the file to write.
"""

import base64
import json
import sys
from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import tensorrt_bindings as trt

from engines.backends.trt import plugin
from engines.errors import EngineError


class Dimension:
    """Stands in for `IDimensionExpr`: holds a known value, where TensorRT has an expression of unknown ones."""

    def __init__(self, value: int):
        self.value = value

    def is_constant(self) -> bool:
        return False

    def get_constant_value(self) -> int:
        raise AssertionError("not known while a plan is built")


class Arithmetic:
    """Stands in for `IExprBuilder`."""

    def constant(self, value: int) -> Dimension:
        return Dimension(value)

    def operation(self, op: Any, a: Dimension, b: Dimension) -> Dimension:
        results = {
            "PROD": a.value * b.value,
            "FLOOR_DIV": a.value // b.value,
            "CEIL_DIV": ceil(a.value / b.value),
        }
        return Dimension(results[op.name])


class Registry:
    """Stands in for the plugin registry, which is part of the C++ library."""

    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        self.creators[creator.name, creator.plugin_version, namespace] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators[name, version, namespace]


class Exprs(list[Any]):
    """Stands in for `DimsExprs`, which takes only the library's dimensions."""

    def __init__(self, length: int):
        super().__init__([None] * length)


class Argument:
    """Stands in for `ISymExpr`: an integer argument of a kernel launch."""


class Arguments(dict[int, Any]):
    nbSymExprs = 0  # noqa: N815  (the library's name)


REGISTRY = Registry()
trt.get_plugin_registry = lambda: REGISTRY
trt.IDimensionExpr, trt.DimsExprs, trt.ISymExpr = Dimension, Exprs, Argument
sys.modules["tensorrt"] = trt  # whose `plugin` is what the distribution `tensorrt` has under that name


def described(shape: Sequence[int], kind: Any) -> Any:
    """A tensor as the builder describes it; of three dimensions the first two are unknown."""
    tensor = trt.DynamicPluginTensorDesc()
    described = tensor.desc
    described.dims = trt.Dims((-1, -1, shape[2]) if len(shape) == 3 else tuple(shape))
    described.type, described.format = kind, trt.TensorFormat.LINEAR
    tensor.desc = described
    return tensor


def told(name: str, kind: Any, frames: int, heads: int, inputs: Sequence[Sequence[int]]) -> dict[str, Any]:
    """All that TensorRT learns of one node."""
    creator = REGISTRY.get_creator(name, "1", "reelray")
    (named,) = creator.field_names
    fields = [trt.PluginField(named.name, np.array([frames, heads], np.int32), trt.PluginFieldType.INT32)]  # as the parser does
    wish = trt.QuickPluginCreationRequest.PREFER_AOT
    made = creator.create_plugin(name, "reelray", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD, wish)
    types = made.get_output_data_types([kind] * len(inputs), [len(shape) for shape in inputs])
    dimensions = [[Dimension(n) for n in shape] for shape in inputs]
    (out,) = made.get_output_shapes(dimensions, [], Arithmetic())
    shape = [dimension.value for dimension in out]
    tensors = [described(size, kind) for size in (*inputs, shape)]
    combinations = made.get_supported_format_combinations(tensors, len(inputs))
    made.configure_plugin(tensors[:-1], tensors[-1:])
    launches = {}
    for tactic in sorted(made.get_valid_tactics()):
        made.set_tactic(tactic)
        launch, whole = SimpleNamespace(), Arguments()
        made.get_launch_params(dimensions, tensors, len(inputs), launch, whole, Arithmetic())
        entry, ptx = made.get_kernel([tensor.desc for tensor in tensors[:-1]], [tensors[-1].desc])
        assert whole.nbSymExprs == len(whole)
        launches[tactic] = {
            "entry": entry,
            "ptx": base64.b64encode(ptx).decode(),
            "whole": [[whole[i].dtype.name, whole[i].expr.value] for i in range(len(whole))],
            **{key: value.expr.value for key, value in vars(launch).items()},
        }
    return {
        "field": [named.name, named.type.name],
        "output": [types[0].name, shape],
        "combinations": [[c.type.name, c.format.name] for c in combinations],
        "launches": launches,
    }


def refused(attempt: Callable[[], Any]) -> str:
    """The message of the error that `attempt` raises; "" if it raises none."""
    try:
        attempt()
    except (ValueError, EngineError) as exc:
        return str(exc)
    return ""


def main(capability: int, path: Path) -> None:
    plugin.current_capability = lambda: capability
    plugin.register()
    plugin.register()  # does nothing
    kinds = trt.DataType
    nodes = {
        "svd": told("ReelrayTemporalAttention", kinds.BF16, 24, 5, [(24, 2304, 960)]),
        "motion": told("ReelrayTemporalAttentionWithTable", kinds.HALF, 16, 8, [(32, 67, 960), (32, 960)]),
        "fp32": refused(lambda: told("ReelrayTemporalAttention", kinds.FLOAT, 24, 5, [(24, 2304, 960)])),
        "unannotated": refused(lambda: trt.plugin.register("reelray::Wrong")(lambda qkv: qkv)),
    }
    path.write_text(json.dumps(nodes))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
