"""Shows a running render: a progress bar on a terminal, elsewhere a plain line for each line of the log.

All of it goes to stderr, so that a script reads from stdout what it asked for.
"""

from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class Terminal:
    """Shows the bar within `with`, if the console is a terminal."""

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
        """For something whose end is not known."""
        if self._console.is_terminal:
            self._bar.update(self._task, description=message, completed=0, total=None)
        elif message != self._said:
            self._said = message
            self._print(message)

    def line(self, message: str, progress: dict[str, Any] | None) -> None:
        """A line of the log. progress: as in a status."""
        if progress is None or not self._console.is_terminal:
            self._print(message)
        else:
            begun = min(
                progress["fraction"], 0.9999
            )  # the clock of a task that is done stands still, and another stage may follow
            self._bar.update(self._task, description=message, completed=begun, total=1)

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
