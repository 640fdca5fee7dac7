"""How a dispatcher reaches the three stages of an endpoint.

Each stage answers with a stream: `Started`, notes for the caller's log, then `Done` with its product. The dispatcher gets
conditioning and latents as references only, which it passes on to the next stage: the bytes go from replica to replica. It reads
the clip, to store it.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from deployments.stages.progress import StageProgress
from engines.spec import Clip

T = TypeVar("T")


@dataclass(frozen=True)
class Started:
    """The first item of every stream: the call's turn has come, and the stage works on it."""


@dataclass(frozen=True)
class Note:
    """A line for the caller's log. level: one of fal's (INFO, WARN, ...). progress: the same for programs."""

    message: str
    level: str = "INFO"
    progress: StageProgress | None = None


@dataclass(frozen=True)
class Done(Generic[T]):
    """The last item of every stream. seconds: spent working, without the wait for the call's turn."""

    product: T
    seconds: float


@dataclass(frozen=True)
class CheckpointRef:
    """Where the attempts at one job store their progress. name: in the file store. used: there was an earlier attempt."""

    name: str
    used: bool


Stream = AsyncGenerator[Started | Note | Done[T], None]
"""`Started`, any number of notes, then `Done`."""

OnNote = Callable[[Started | Note], Awaitable[None]]
"""Is given the items of a stream before its `Done`."""


class Stages(Protocol):
    """The stages of one endpoint. Cancelling a call stops the work behind it; conditioning and latents are opaque references.

    Every call raises `ReelrayError`, retryable if the runner and not the request was at fault.
    """

    async def preprocess(self, job_input: dict[str, Any], on_note: OnNote, *, alone: bool = False) -> Done[Any]:
        """The conditioning for a validated input. alone: made beside no other job, since this one may kill its replica."""
        ...

    async def denoise(self, conditioning: Any, checkpoint: CheckpointRef, on_note: OnNote) -> Done[Any]:
        """The latents. Goes on from the checkpoint of an earlier attempt, if there is one."""
        ...

    async def saved(self, checkpoint: CheckpointRef, on_note: OnNote) -> Any | None:
        """The latents, if an earlier attempt has finished them."""
        ...

    async def decode(self, latents: Any, on_note: OnNote) -> Done[Clip]:
        """The encoded clip itself."""
        ...
