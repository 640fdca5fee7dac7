"""How a dispatcher reaches the three stages of an endpoint.

A stage that has something to tell answers with a stream: notes for the caller's log, then None, then its product. The
product stays where it was made and goes on as a reference: its bytes never visit the dispatcher.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from engines.spec import Clip


@dataclass(frozen=True)
class Note:
    """A line for the caller's log. level: one of fal's (INFO, WARN, ...)."""

    message: str
    level: str = "INFO"


OnNote = Callable[[Note], Awaitable[None]]
Stream = AsyncIterator[Any]
"""Notes, then None, then the product."""


class Stages(Protocol):
    """The stages of one endpoint. Cancelling a call stops the work behind it; conditioning and latents are opaque references.

    Every call raises `ReelrayError`, retryable if the runner and not the request was at fault.
    """

    async def preprocess(self, job_input: dict[str, Any], on_note: OnNote) -> Any:
        """The conditioning for a validated input."""
        ...

    async def denoise(self, conditioning: Any, on_note: OnNote) -> Any:
        """The latents; a note for every step."""
        ...

    async def decode(self, latents: Any) -> Clip:
        """The encoded clip."""
        ...
