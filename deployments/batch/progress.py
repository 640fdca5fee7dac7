"""How far a run is: lines in its log, a bar on a terminal, and a file in its folder, which tells other machines."""

import json
import logging
import os
import socket
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Literal, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from deployments.batch.records import Record
from deployments.batch.run_folder import RunFolder

logger = logging.getLogger(__name__)

FILE_EVERY_S, LINE_EVERY_S = 2.0, 10.0
SILENT_S = 60.0
"""A driver of another machine that has not written for so long has ended."""

State = Literal["running", "stopped", "finished", "broken"]


@dataclass
class Snapshot:
    """state: of the run's driver; broken: it ended by an error. Counts are of rows. earlier: ended before this driver began.

    begun_at, updated_at: in seconds since 1970. host, pid: of the driver.
    """

    total: int
    state: State = "running"
    done: int = 0
    earlier: int = 0
    failed: int = 0
    begun_at: float = 0.0
    updated_at: float = 0.0
    host: str = ""
    pid: int = 0
    error: str | None = None

    @property
    def rate(self) -> float:
        """Rows a second, since this driver began."""
        return (self.done + self.failed - self.earlier) / max(self.updated_at - self.begun_at, 1e-3)

    @property
    def left_s(self) -> float | None:
        """How long the rest will take, in seconds; None: nobody knows yet."""
        left = self.total - self.done - self.failed
        return left / self.rate if self.rate > 0 else None

    @property
    def is_running(self) -> bool:
        """Whether its driver still works."""
        if self.state != "running":
            return False
        if self.host == socket.gethostname():
            return _exists(self.pid)
        return time.time() - self.updated_at < SILENT_S

    def line(self) -> str:
        """For people."""
        parts = [f"{self.done} of {self.total} done"]
        if self.failed:
            parts.append(f"{self.failed} failed")
        if self.is_running:
            if self.rate > 0:
                parts.append(f"{self.rate * 60:.1f} a minute")
            if self.left_s is not None:
                parts.append(f"about {timedelta(seconds=round(self.left_s))} left")
        else:
            parts.append("its driver has died" if self.state == "running" else self.state)
        return ", ".join(parts) + (f": {self.error}" if self.error else "")


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def read_progress(folder: RunFolder, name: str) -> Snapshot | None:
    """What the last driver of the run wrote; None: there was none."""
    data = folder.read(name)
    return None if data is None else Snapshot(**json.loads(data))


def all_progress(folder: RunFolder) -> dict[str, Snapshot]:
    """What the drivers of all shards wrote: file -> it."""
    found = {name: read_progress(folder, name) for name in sorted(folder.names("")) if name.startswith("progress")}
    return {name: now for name, now in found.items() if now is not None}


class Reporter:
    """A context manager for the time of the work. name: of the file in the run's folder."""

    def __init__(self, folder: RunFolder, name: str, total: int, console: Console):
        self.now = Snapshot(total, begun_at=time.time(), host=socket.gethostname(), pid=os.getpid())
        self._folder, self._name, self._console = folder, name, console
        self._written = self._said = 0.0
        self._bar = Progress(TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn(), console=console)
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        if exc is None:
            self.now.state = "finished"
        elif isinstance(exc, Exception):
            self.now.state, self.now.error = "broken", str(getattr(exc, "message", exc))
        else:
            self.now.state = "stopped"
        if self._console.is_terminal:
            self._bar.stop()
        self.tell(force=True)

    def begin(self, done: int, refused: int) -> None:
        """Rows that had ended before."""
        self.now.done, self.now.failed, self.now.earlier = done, refused, done + refused
        self.tell(force=True)

    def ended(self, record: Record) -> None:
        """Another row has ended."""
        if record.status == "done":
            self.now.done += 1
        else:
            self.now.failed += 1
            line = f"row {record.row} ({record.id}) {record.status}: {record.error}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        self.tell()

    def tell(self, *, force: bool = False) -> None:
        """Says how far the run is, unless it has just done so."""
        now, clock = self.now, time.monotonic()
        now.updated_at = time.time()
        if self._console.is_terminal:
            self._bar.update(self._task, description=now.line(), completed=now.done + now.failed)
        elif force or clock - self._said >= LINE_EVERY_S:
            self._said = clock
            self._console.print(now.line(), markup=False, highlight=False, soft_wrap=True)
        if force or clock - self._written >= FILE_EVERY_S:
            self._written = clock
            fields: dict[str, Any] = asdict(now)
            self._folder.write(self._name, json.dumps(fields).encode())
