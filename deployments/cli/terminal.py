"""Shows a running render: a progress bar on a terminal, elsewhere a plain line for each line of the log.

Everything goes to stderr, so that stdout holds only the result, for scripts.
"""

from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class Terminal:
    """A context manager, which shows the bar if the console is a terminal."""

    def __init__(self, console: Console):
        self._console = console
        self._said = ""
        self._bar = Progress(TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn(), console=console)
        self._task = self._bar.add_task("queued", total=None)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def wait(self, message: str) -> None:
        """Shows a message while it is not known how long something will take."""
        if self._console.is_terminal:
            self._bar.update(self._task, description=message, completed=0, total=None)
        elif message != self._said:
            self._said = message
            self._print(message)

    def line(self, message: str, progress: dict[str, Any] | None) -> None:
        """Shows a line of the log. progress: as in a request's status."""
        if progress is None or not self._console.is_terminal:
            self._print(message)
        else:
            # Never 1: rich stops the clock of a completed task, and another stage may follow
            completed = min(progress["fraction"], 0.9999)
            self._bar.update(self._task, description=message, completed=completed, total=1)

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
