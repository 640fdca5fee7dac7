"""Reads from our sources how they use the TensorRT library, and compares that with what its bindings offer.

A small type inference over `ast`: `trt` and `library` are the module. Its objects, and what their methods return according to
pybind11's signatures, are followed through names, attributes of self, return values and containers. A name without a value in
its own file is taken for an argument, which may have any type that the name has in another file.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODULE = "module"
ROOTS = ("trt", "library", "self._trt")


@dataclass(frozen=True)
class Signature:
    """names: the arguments after self. required: how many have no default. returns: a class of the library, or ""."""

    names: tuple[str, ...]
    required: int
    returns: str

    def takes(self, call: ast.Call) -> bool:
        """Whether the arguments fit by number and name."""
        given = [keyword.arg for keyword in call.keywords]
        left = self.names[len(call.args) :]
        needed = set(self.names[len(call.args) : self.required])
        return len(call.args) <= len(self.names) and set(given) <= set(left) and needed <= set(given)


def parsed(signature: str) -> Signature:
    """Parses pybind11's text, e.g. "get_error(self: tensorrt_bindings.tensorrt.OnnxParser, index: int) -> ...ParserError"."""
    text = re.sub(r"<[^<>]*>", "None", signature).replace("::", ".")  # defaults and types in C++
    named = text if not text.startswith("(") else f"get{text}"  # a property's signature has no name
    function = ast.parse(f"def {named}: ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    names = tuple(arg.arg for arg in function.args.args)
    returns = ast.unparse(function.returns).rpartition(".")[2] if function.returns else ""
    return Signature(names[1:], len(names) - 1 - len(function.args.defaults), returns)


class ApiUse:
    """faults: uses in our sources that the library does not offer. checked: (class, member) that they use and it offers."""

    def __init__(self, classes: dict[str, Any], sources: Iterable[Path | str]):
        self.classes = classes
        self.types: dict[tuple[str, str], set[str]] = defaultdict(set)
        self.everywhere: dict[str, set[str]] = defaultdict(set)
        self.recast: set[str] = set()
        self.faults: list[str] = []
        self.checked: set[tuple[str, str]] = set()
        for root in ROOTS:
            self.everywhere[root] = {MODULE}
        trees = {s.name if isinstance(s, Path) else "": ast.parse(s.read_text() if isinstance(s, Path) else s) for s in sources}
        before = -1
        while before != (before := sum(map(len, self.types.values()))):
            for self._here, tree in trees.items():
                self._assign(tree)
        for self._here, tree in trees.items():
            called = {}
            for node in ast.walk(tree):  # `walk` gives a call before the attribute that it calls
                if isinstance(node, ast.Call):
                    called[node.func] = node
                elif isinstance(node, ast.Attribute):
                    self._judge(f"{self._here}:{node.lineno}", node, called.get(node))

    def _assign(self, tree: ast.Module) -> None:
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
                for target, value in zip(node.targets[0].elts, node.value.elts, strict=True):
                    self._flow(target, value)
            elif isinstance(node, ast.Assign):
                self._flow(node.targets[0], node.value)
            elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
                self._flow(node.target, node.value)
            elif isinstance(node, ast.FunctionDef):
                for inner in ast.walk(node):
                    if isinstance(inner, ast.Return) and inner.value is not None:
                        self._learn(f"{node.name}()", self._of(inner.value))

    def _flow(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Attribute) and target.attr == "__class__":  # a layer is cast to its real class
            self.recast.add(_name(target.value))
            self._learn(_name(target.value), {kind.removeprefix("class ") for kind in self._of(value)})
        elif _name(target):
            self._learn(_name(target), self._of(value))

    def _learn(self, name: str, kinds: set[str]) -> None:
        self.types[self._here, name] |= kinds
        self.everywhere[name] |= kinds

    def _known(self, name: str) -> set[str]:
        return self.types.get((self._here, name)) or self.everywhere.get(name, set())

    def _of(self, node: ast.expr) -> set[str]:
        """The types that an expression may have: "module", "class X", "method X" or X. Empty if none is of the library."""
        if isinstance(node, ast.IfExp):
            return self._of(node.body) | self._of(node.orelse)
        if isinstance(node, ast.Call):
            if returned := self._known(f"{_name(node.func).removeprefix('self.')}()"):
                return returned
            return {self._result(kind, node.func) for kind in self._of(node.func)} - {""}
        if isinstance(node, ast.Attribute) and not self._known(_name(node)):
            return {self._member(kind, node.attr) for kind in self._of(node.value)} - {""}
        return self._known(_name(node))

    def _result(self, kind: str, function: ast.expr) -> str:
        """The type of a call's result: the class that is called, or the return type in the method's signature."""
        if kind.startswith("class "):
            return kind.removeprefix("class ")
        return kind.removeprefix("method ") if kind.startswith("method ") else ""

    def _member(self, kind: str, name: str) -> str:
        if kind == MODULE:
            return f"class {name}" if name in self.classes else ""
        owner = self._owner(kind)
        about = owner["members"].get(name) if owner else None
        if about is None:
            return ""
        if about["kind"] == "class":
            return f"{kind}.{name}"
        if kind.startswith("class "):  # an enumeration's member
            return kind.removeprefix("class ")
        returns = parsed(about["signatures"][0]).returns if about.get("signatures") and "->" in about["signatures"][0] else ""
        returns = returns if returns in self.classes else ""
        return f"method {returns}" if about["kind"] == "method" else returns

    def _owner(self, kind: str) -> dict[str, Any] | None:
        name, _, nested = kind.removeprefix("class ").partition(".")
        owner = self.classes.get(name)
        return owner["members"].get(nested) if owner and nested else owner

    def _judge(self, place: str, node: ast.Attribute, call: ast.Call | None) -> None:
        kinds = [kind for kind in self._of(node.value) if not kind.startswith("method")]
        faults = [fault for kind in kinds if (fault := self._fault(kind, node, call))]
        if len(faults) == len(kinds) if _name(node.value) in self.recast else faults:
            self.faults += [f"{place}: {fault}" for fault in faults]
        if not kinds and node.attr in self._telling:
            self.faults.append(f"{place}: {node.attr} of something unknown")

    def _fault(self, kind: str, node: ast.Attribute, call: ast.Call | None) -> str:
        name = node.attr
        if name.startswith("__"):
            return ""
        if kind == MODULE:
            if name not in self.classes:
                return f"no class {name}"
            found: dict[str, Any] = {"kind": "class", **self.classes[name]}
        else:
            owner = self._owner(kind)
            if owner is None or name not in owner["members"]:
                return f"{kind} has no {name}"
            found = owner["members"][name]
        self.checked.add((kind.removeprefix("class "), name))
        if isinstance(node.ctx, ast.Store) and not found.get("settable"):
            return f"{kind}.{name} cannot be set"
        if call is not None:
            offered = [parsed(s) for s in found["constructors" if found["kind"] == "class" else "signatures"] if "->" in s]
            if not any(signature.takes(call) for signature in offered):
                return f"{kind}.{name} does not take {ast.unparse(call)}"
        return ""

    @property
    def _telling(self) -> set[str]:
        """Method names that only the library has: if one is called on an unknown type, the inference has missed something."""
        return {
            name
            for about in self.classes.values()
            for name, member in about["members"].items()
            if member["kind"] == "method" and "_" in name.strip("_")
        }


def _name(node: ast.expr) -> str:
    """The name of an expression: x, self.x, or x[] for an item of x; "" for others."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return f"self.{node.attr}"
    if isinstance(node, ast.Subscript) and (held := _name(node.value)):
        return f"{held}[]"
    return ""


def members(tree: Iterable[type]) -> Iterator[tuple[str, str, Any]]:
    """(class, name, value) of each public member of these classes."""
    for kind in tree:
        for name, value in vars(kind).items():
            if not name.startswith(("_", "hidden_")):
                yield kind.__name__, name, value
