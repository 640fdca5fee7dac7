"""How a dispatcher reaches the three stages of an endpoint, and a sampler the replicas that denoise.

Each stage answers with a stream: `Started`, notes for the caller's log, then `Done` with its product. The dispatcher gets
conditioning and latents as references only, which it passes on to the next stage: the bytes go from replica to replica. It reads
the clip, to store it.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from deployments.stages.progress import StageProgress
from engines.spec import Clip
from engines.units import Report, Unit, UnitOutput

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
    """The last item of every stream. seconds: spent working, without the wait for the call's turn.

    gpu_seconds: those of one GPU or several together; 0 on a CPU. receipt: what the stage adds to the job's receipt, as JSON.
    busy_s, width: of denoising, how long replicas worked for the job, in seconds, and how many of them it could have kept busy.
    """

    product: T
    seconds: float
    gpu_seconds: float = 0.0
    receipt: Mapping[str, Any] = field(default_factory=dict)
    busy_s: float = 0.0
    width: int = 1


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

    async def denoise(self, conditioning: Any, checkpoint: CheckpointRef, on_note: OnNote, *, priority: int = 0) -> Done[Any]:
        """The latents. Goes on from the checkpoint of an earlier attempt, if there is one. priority: a lower one comes first."""
        ...

    async def saved(self, checkpoint: CheckpointRef, on_note: OnNote) -> Any | None:
        """The latents, if an earlier attempt has finished them."""
        ...

    async def decode(self, latents: Any, on_note: OnNote) -> Done[Clip]:
        """The encoded clip itself."""
        ...

    def watch_replicas(self, changed: Callable[[int], None]) -> None:
        """Calls `changed` with the number of replicas that denoise whenever it changes."""
        ...


@dataclass(frozen=True)
class UnitCall:
    """A unit for a replica. run: names this run of it. job: names the units that have one conditioning. traceparent: of it."""

    run: str
    job: str
    unit: Unit
    traceparent: str | None = None


class Replicas(Protocol):
    """The replicas that denoise for an endpoint. Each has a name, which never comes back after its end.

    Every call raises `RunnerDisconnected` if the replica has died or left.
    """

    def watch(self, changed: Callable[[frozenset[str]], None]) -> None:
        """Calls `changed` in this event loop with the names of all there are, whenever that changes."""
        ...

    async def wake(self) -> None:
        """Returns once there is a replica; if there is none, this asks for one."""
        ...

    async def arithmetic(self, replica: str) -> str:
        """See `deployments.stages.denoise.Denoise`."""
        ...

    def run(self, replica: str, call: UnitCall, conditioning: Any) -> AsyncGenerator[Report | UnitOutput, None]:
        """What the unit reports, then its output. conditioning: an opaque reference, as the dispatcher gave it."""
        ...

    async def stop(self, replica: str, runs: Sequence[str]) -> None:
        """Ends runs of units within one call of a net; `run` then raises `Cancelled`."""
        ...

    async def forget(self, replica: str, job: str) -> None:
        """The job has ended: nothing of it need be kept."""
        ...
