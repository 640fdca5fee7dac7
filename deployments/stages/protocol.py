"""How a dispatcher reaches the three stages of an endpoint.

Each answers with a stream: `STARTED`, notes for the caller's log, then `Done`, then its product. Conditioning and latents stay
where they were made and go on as references: their bytes never visit the dispatcher. The clip does, to be stored.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from deployments.stages.progress import StageProgress
from engines.spec import Clip


@dataclass(frozen=True)
class Note:
    """A line for the caller's log. level: one of fal's (INFO, WARN, ...). progress: what the line says, if it is of that."""

    message: str
    level: str = "INFO"
    progress: StageProgress | None = None


STARTED = Note("")
"""The first note of every stage: its turn has come. It has no line in the log."""


@dataclass(frozen=True)
class Done:
    """The product follows. seconds: of work, without waiting for a turn."""

    seconds: float


@dataclass(frozen=True)
class CheckpointRef:
    """Where the attempts at one job store their progress. name: in the file store. used: there was an earlier attempt."""

    name: str
    used: bool


OnNote = Callable[[Note], Awaitable[None]]
Stream = AsyncIterator[Any]
"""`STARTED`, notes, then `Done`, then the product."""


class Stages(Protocol):
    """The stages of one endpoint. Cancelling a call stops the work behind it; conditioning and latents are opaque references.

    Every call raises `ReelrayError`, retryable if the runner and not the request was at fault.
    """

    async def preprocess(self, job_input: dict[str, Any], on_note: OnNote) -> tuple[Any, float]:
        """The conditioning for a validated input, and the seconds of work in it."""
        ...

    async def denoise(self, conditioning: Any, checkpoint: CheckpointRef, on_note: OnNote) -> tuple[Any, float]:
        """The latents, and the seconds. It goes on where an earlier attempt has stopped."""
        ...

    async def saved(self, checkpoint: CheckpointRef, on_note: OnNote) -> Any | None:
        """The latents, where an earlier attempt has finished them."""
        ...

    async def decode(self, latents: Any, on_note: OnNote) -> tuple[Clip, float]:
        """The encoded clip itself, and the seconds."""
        ...
