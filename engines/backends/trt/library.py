"""Loads TensorRT late, refuses unsuitable versions, and collects its error messages.

Both libraries have the same Python interface. On failure its objects return None or False and log the reason; a factory that
fails raises a TypeError without a reason. Both become an `EngineError` with the library's own message.
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
"""Oldest version of TensorRT proper; 10.16.0 to 11.4.0 have all that we use. TensorRT-RTX has other version numbers."""

DROPS_BIASES = (11, 3, 0)
"""Version with a documented bug: a refittable plan can lose the bias of a matrix product. `tensorrt-triton.md`, section 3."""


def load_library(name: Library) -> ModuleType:
    """The module of that name. Raises `EngineError` if it is not installed or too old."""
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
    """The library's latest error messages, from its logger."""

    def __init__(self) -> None:
        self._errors: deque[str] = deque(maxlen=3)

    def note(self, text: str) -> None:
        """Keeps an error for the next `fault`."""
        self._errors.append(text)

    def fault(self, what: str) -> EngineError:
        """The error to raise: `what`, with the noted messages as reason. Clears them, so that no later error quotes them."""
        reason = "; ".join(self._errors) or "the library gave no reason"
        self._errors.clear()
        return EngineError(f"{what}: {reason}")

    @contextmanager
    def blamed_on(self, what: str) -> Iterator[None]:
        """Turns exceptions of the bindings into a `fault`."""
        try:
            yield
        except (TypeError, ValueError, RuntimeError) as exc:
            self.note(str(exc))
            raise self.fault(what) from exc


def note_faults(parser: Any, said: Messages) -> None:
    """Notes the errors of an `OnnxParser` or `OnnxParserRefitter` for the next `fault`."""
    for i in range(parser.num_errors):
        said.note(str(parser.get_error(i)))


def logger_of(library: ModuleType, said: Messages) -> Any:
    """An `ILogger` that notes errors in `said`, to be raised, and logs warnings. Must outlive all objects made with it."""
    trt: Any = library
    levels = trt.ILogger.Severity

    class Log(trt.ILogger):  # type: ignore[misc]  # a class of whichever library is loaded
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            if severity in (levels.ERROR, levels.INTERNAL_ERROR):
                said.note(message)
            elif severity == levels.WARNING:
                logger.warning("TensorRT says", extra={"action": "tensorrt", "text": message})

    return Log()
