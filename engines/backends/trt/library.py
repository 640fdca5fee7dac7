"""TensorRT itself: loaded late, refused where its version is known not to do, and heard when it only answers None.

Both libraries have the same Python interface. Its objects return None or False on failure and say why to their logger; a
factory that fails raises a TypeError that names no reason. All of it becomes an `EngineError` in the library's own words.
"""

import importlib
import logging
import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Literal

from engines.errors import EngineError

logger = logging.getLogger(__name__)

Library = Literal["tensorrt", "tensorrt_rtx"]

OLDEST = (10, 16)
"""Of TensorRT proper; all that we use is in the bindings of 10.16.0 to 11.4.0. TensorRT-RTX counts otherwise."""

DROPS_BIASES = (11, 3, 0)
"""Documented: a plan built to be refitted can lose the bias of a matrix product. `tensorrt-triton.md`, section 3."""


def load_library(name: Library) -> ModuleType:
    """The module of that name. Raises `EngineError` where it is not installed, or too old."""
    try:
        library = importlib.import_module(name)
    except ImportError as exc:
        raise EngineError(f"{name} cannot be imported: {exc}") from exc
    require_supported(library)
    return library


def require_supported(library: ModuleType, refit: bool = False) -> None:
    """Raises `EngineError` for a TensorRT that is too old or, if weights are to be exchanged, known to spoil them."""
    if library.__name__ != "tensorrt":
        return
    version = tuple(int(part) for part in re.findall(r"\d+", library.__version__)[:3])
    if version < OLDEST:
        raise EngineError(f"TensorRT {library.__version__} is too old: {'.'.join(map(str, OLDEST))} or newer is needed")
    if refit and version == DROPS_BIASES:
        raise EngineError(f"TensorRT {library.__version__} can lose biases in plans that are refitted: use another version")


class Messages:
    """The last errors that the library has told its logger."""

    def __init__(self) -> None:
        self._errors: deque[str] = deque(maxlen=3)

    def note(self, text: str) -> None:
        """Keeps an error for the next `fault`."""
        self._errors.append(text)

    def fault(self, what: str) -> EngineError:
        """The error to raise: `what`, and why. Forgets what was said, which must not be blamed on something later."""
        reason = "; ".join(self._errors) or "the library gave no reason"
        self._errors.clear()
        return EngineError(f"{what}: {reason}")

    @contextmanager
    def blamed_on(self, what: str) -> Iterator[None]:
        """Turns what the bindings raise into a `fault`."""
        try:
            yield
        except (TypeError, ValueError, RuntimeError) as exc:
            self.note(str(exc))
            raise self.fault(what) from exc


def note_faults(parser: Any, said: Messages) -> None:
    """Keeps what an `OnnxParser` or `OnnxParserRefitter` has found wrong for the next `fault`."""
    for i in range(parser.num_errors):
        said.note(str(parser.get_error(i)))


def logger_of(library: ModuleType, said: Messages) -> Any:
    """An `ILogger`: errors go to `said`, to be raised, and warnings to our log. Must outlive all that is made with it."""
    trt: Any = library
    levels = trt.ILogger.Severity

    class Log(trt.ILogger):  # type: ignore[misc]  # a class of the library that was chosen
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            if severity in (levels.ERROR, levels.INTERNAL_ERROR):
                said.note(message)
            elif severity == levels.WARNING:
                logger.warning("TensorRT says", extra={"action": "tensorrt", "text": message})

    return Log()
