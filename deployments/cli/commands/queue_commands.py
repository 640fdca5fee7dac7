"""`reelray queue ...`: pausing and watching the endpoints' queues."""

import asyncio
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from deployments.cli.shared import DEFAULT_CONFIG, Config, EndpointId, endpoint_named, in_store, print_line

if TYPE_CHECKING:
    from deployments.jobs.store import JobStore, QueueStatus
    from deployments.jobs.work import StageStatus

DRAIN_POLL_S = 0.5
STALE_S = 30.0
"""The autoscaling writes what it knows every second or so; after this many it has stopped."""
ORDER = ("preprocess", "denoise", "decode")
"""Of a job's stages."""

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
def status(
    endpoint: EndpointId,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one JSON object.")] = False,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Show how many jobs of an endpoint wait and run, whether it is paused, and each stage's backlog and replicas."""
    from deployments.jobs.work import stages

    endpoint_id = endpoint_named(endpoint).id

    async def look(store: "JobStore") -> "tuple[QueueStatus, list[tuple[StageStatus, float]]]":
        known = [each for each in await stages(store.database) if each[0].endpoint == endpoint_id]
        return await store.queue_status(endpoint_id), sorted(known, key=lambda each: ORDER.index(each[0].stage))

    found, known = in_store(config, look)
    if as_json:
        fields = [{**asdict(each), "age_s": round(age_s, 1)} for each, age_s in known]
        print_line(json.dumps({"endpoint": endpoint_id, **asdict(found), "stages": fields}, default=str))
        return
    print_line(_described(endpoint_id, found))
    for each, age_s in known:
        print_line(_described_stage(each, age_s))


def _described_stage(stage: "StageStatus", age_s: float) -> str:
    """E.g. "  denoise: 42 s of backlog, 2 replicas, target 3"."""
    age = f" ({age_s:.0f} s ago; nothing is scaled since)" if age_s > STALE_S else ""
    return f"  {stage.stage}: {stage.backlog_s:.0f} s of backlog, {stage.replicas} replicas, target {stage.target}{age}"


def _described(endpoint_id: str, status: "QueueStatus") -> str:
    state = f"paused since {status.paused_at:%Y-%m-%d %H:%M:%S} UTC" if status.paused_at else "open"
    delayed = f" ({status.delayed} for another attempt)" if status.delayed else ""
    return f"{endpoint_id}: {state}, {status.queued} waiting{delayed}, {status.running} running"
