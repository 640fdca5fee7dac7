"""`reelray queue ...`: pausing and watching the endpoints' queues."""

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from deployments.cli.shared import DEFAULT_CONFIG, Config, EndpointId, endpoint_named, in_store, print_line

if TYPE_CHECKING:
    from deployments.jobs.store import JobStore, QueueStatus

DRAIN_POLL_S = 0.5

queue = typer.Typer(help="Pause, resume and watch the endpoints' queues.", no_args_is_help=True)


@queue.command()
def pause(
    endpoint: EndpointId,
    drain: Annotated[bool, typer.Option(help="Wait until none of its jobs is running.")] = False,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Start no more jobs of an endpoint. Running jobs go on; new submissions are accepted and wait."""
    endpoint_id = endpoint_named(endpoint).id

    async def pause_and_drain(store: "JobStore") -> "QueueStatus":
        await store.pause(endpoint_id)
        while True:
            status = await store.queue_status(endpoint_id)
            if not (drain and status.running):
                return status
            await asyncio.sleep(DRAIN_POLL_S)

    print_line(_described(endpoint_id, in_store(config, pause_and_drain)))


@queue.command()
def resume(endpoint: EndpointId, config: Config = DEFAULT_CONFIG) -> None:
    """Start jobs of a paused endpoint again."""
    endpoint_id = endpoint_named(endpoint).id

    async def resume_and_look(store: "JobStore") -> "QueueStatus":
        await store.resume(endpoint_id)
        return await store.queue_status(endpoint_id)

    print_line(_described(endpoint_id, in_store(config, resume_and_look)))


@queue.command()
def status(endpoint: EndpointId, config: Config = DEFAULT_CONFIG) -> None:
    """Show how many jobs of an endpoint wait and run, and whether it is paused."""
    endpoint_id = endpoint_named(endpoint).id
    print_line(_described(endpoint_id, in_store(config, lambda store: store.queue_status(endpoint_id))))


def _described(endpoint_id: str, status: "QueueStatus") -> str:
    state = f"paused since {status.paused_at:%Y-%m-%d %H:%M:%S} UTC" if status.paused_at else "open"
    delayed = f" ({status.delayed} for another attempt)" if status.delayed else ""
    return f"{endpoint_id}: {state}, {status.queued} waiting{delayed}, {status.running} running"
