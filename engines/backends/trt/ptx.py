"""Changes a kernel's PTX so that its entry takes only our arguments.

Triton adds two pointers after every entry's arguments, to memory that its own launcher provides (3.7.1; earlier versions add
one). TensorRT passes the arguments alone, so the pointers must be removed, as in NVIDIA's own test of such a plugin
(TensorRT-Incubator, tripy). That is correct only if the kernel does not use that memory.
"""

import re
from collections.abc import Sequence

from engines.errors import EngineError

POINTER, WHOLE = "u64", "u32"
"""The PTX types of our arguments."""


def without_hidden(ptx: str, entry: str, arguments: Sequence[str], scratch: int) -> str:
    """The text without parameters after the entry's `arguments` (each `POINTER` or `WHOLE`, in order).

    scratch: bytes of memory that the kernel needs from its launcher. Raises `EngineError` unless that is 0, the entry has these
    arguments, and all parameters after them are pointers that the kernel never reads.
    """
    if scratch:
        raise EngineError(f"{entry} wants {scratch} bytes from its launcher, which TensorRT does not give")
    start, end = _parameters(ptx, entry)
    declared = ptx[start:end].split(",")
    kinds = [_kind(text) for text in declared]
    if kinds[: len(arguments)] != list(arguments):
        raise EngineError(f"{entry} takes {kinds} and not {list(arguments)}")
    for text, kind in zip(declared[len(arguments) :], kinds[len(arguments) :], strict=True):
        name = text.split()[-1]
        if kind != POINTER or re.search(rf"\b{re.escape(name)}\b", ptx[end:]):
            raise EngineError(f"{name} of {entry} is more than an unused pointer")
    return ptx[:start] + ",".join(declared[: len(arguments)]).rstrip() + "\n" + ptx[end:]


def parameters(ptx: str, entry: str) -> list[str]:
    """The types of the entry's parameters, e.g. "u64"."""
    start, end = _parameters(ptx, entry)
    return [_kind(text) for text in ptx[start:end].split(",")]


def _parameters(ptx: str, entry: str) -> tuple[int, int]:
    """The start and end of the entry's parameters in the text."""
    found = re.findall(r"\.entry\s+[\w$]+", ptx)
    match = re.search(rf"\.entry\s+{re.escape(entry)}\(([^()]*)\)", ptx)
    if match is None or len(found) != 1:
        raise EngineError(f"the PTX has {found} and not one entry {entry} with parameters")
    return match.start(1), match.end(1)


def _kind(declaration: str) -> str:
    """The type in a declaration: "u64" for ".param .u64 .ptr .global .align 1 kernel_param_0"."""
    match = re.match(r"\s*\.param\s+\.(\w+)\s", declaration)
    if match is None:
        raise EngineError(f"{declaration.strip()!r} is no parameter")
    return match[1]
