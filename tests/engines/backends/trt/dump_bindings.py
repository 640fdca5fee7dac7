"""Prints as JSON what the real TensorRT bindings offer, in a process whose library path leads to empty libraries.

Only pybind11's signatures are read; TensorRT itself is not installed and does not run.
"""

import json
import sys
from typing import Any

import tensorrt_bindings


def member(owner: type, name: str) -> dict[str, Any]:
    value = getattr(owner, name)
    if isinstance(value, property):
        return {"kind": "property", "signatures": signatures(value.fget), "settable": value.fset is not None}
    if isinstance(value, type):
        return {"kind": "class", **about(value)}
    return {"kind": "method", "signatures": signatures(value)} if callable(value) else {"kind": "value"}


def signatures(function: Any) -> list[str]:
    """The first line of a plain docstring, or the numbered lines of an overloaded one."""
    lines = (function.__doc__ or "").splitlines()
    if any("Overloaded function" in line for line in lines):
        return [line.partition(". ")[2] for line in lines if line.partition(". ")[0].isdigit() and "->" in line]
    return lines[:1]


def about(kind: Any) -> dict[str, Any]:
    return {
        "constructors": signatures(kind.__init__),
        "members": {name: member(kind, name) for name in dir(kind) if not name.startswith("__")},
    }


if __name__ == "__main__":
    classes = {name: about(value) for name, value in vars(tensorrt_bindings).items() if isinstance(value, type)}
    json.dump({"version": tensorrt_bindings.__version__, "classes": classes}, sys.stdout)
