"""The text of a kernel's PTX made into one whose entry takes our arguments and no more.

Triton gives every entry two pointers behind the arguments, to memory that its own launcher brings along (3.7.1; one of them
before). TensorRT passes the arguments alone, so these must go, as in NVIDIA's own test of such a plugin (TensorRT-Incubator,
tripy); that is right only where the kernel does not want that memory.
"""

import re
from collections.abc import Sequence

from engines.errors import EngineError

POINTER, WHOLE = "u64", "u32"
"""The types that arguments of ours have in PTX."""


def without_hidden(ptx: str, entry: str, arguments: Sequence[str], scratch: int) -> str:
    """The text with nothing behind the entry's `arguments` (`POINTER` or `WHOLE` each, in order).

    scratch: bytes of memory that the kernel wants from its launcher. Raises `EngineError` unless that is 0, the arguments are as
    told, and all behind them are pointers that the kernel never reads.
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
    """The types of what the entry takes, e.g. "u64"."""
    start, end = _parameters(ptx, entry)
    return [_kind(text) for text in ptx[start:end].split(",")]


def _parameters(ptx: str, entry: str) -> tuple[int, int]:
    """Where the entry's parameters stand."""
    found = re.findall(r"\.entry\s+[\w$]+", ptx)
    match = re.search(rf"\.entry\s+{re.escape(entry)}\(([^()]*)\)", ptx)
    if match is None or len(found) != 1:
        raise EngineError(f"the PTX has {found} and not one entry {entry} with parameters")
    return match.start(1), match.end(1)


def _kind(declaration: str) -> str:
    """u64 of ".param .u64 .ptr .global .align 1 kernel_param_0"."""
    match = re.match(r"\s*\.param\s+\.(\w+)\s", declaration)
    if match is None:
        raise EngineError(f"{declaration.strip()!r} is no parameter")
    return match[1]
