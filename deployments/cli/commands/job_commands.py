"""`reelray jobs ...`: recent jobs, and the timeline of one."""

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from deployments.cli.shared import (
    DEFAULT_CONFIG,
    Config,
    RequestId,
    console,
    endpoint_named,
    fail,
    in_store,
    job_id_of,
    print_line,
)
from deployments.jobs.job import Job, JobEvent, JobState

if TYPE_CHECKING:
    from deployments.jobs.store import JobStore

ROW = "{:36}  {:9}  {:>6}  {:8}  {}"
"""Not a table of rich's, which cuts ids and endpoints where the terminal is narrow or the output is a pipe."""

jobs = typer.Typer(help="The service's jobs: list recent ones, show what happened to one.", no_args_is_help=True)


@jobs.command("list")
def list_recent(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many jobs to show.")] = 20,
    endpoint: Annotated[str | None, typer.Option(help="Only jobs of this endpoint.")] = None,
    state: Annotated[JobState | None, typer.Option(help="Only jobs in this state.")] = None,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Show the jobs that were submitted last, newest first."""
    endpoint_id = endpoint_named(endpoint).id if endpoint else None
    found = in_store(config, lambda store: store.recent(limit, endpoint_id, state))
    now = datetime.now(UTC)
    print_line(ROW.format("id", "state", "age", "attempts", "endpoint"))
    for job in found:
        attempts = f"{job.attempt} of {job.max_attempts}"
        print_line(ROW.format(str(job.id), job.state, age(now - job.created_at), attempts, job.endpoint))


@jobs.command()
def show(request_id: RequestId, config: Config = DEFAULT_CONFIG) -> None:
    """Show a job's timeline: every state it has been in, when, in which attempt and why."""
    job_id = job_id_of(request_id)

    async def read(store: "JobStore") -> tuple[Job | None, list[JobEvent]]:
        return await store.get(job_id), await store.timeline(job_id)

    job, timeline = in_store(config, read)
    if job is None:
        raise typer.Exit(fail(f"there is no job {request_id}; if there was one, its retention has ended"))
    print_line(f"{job.endpoint}: {job.state}" + (f", {job.failure.error}" if job.failure else ""))
    table = Table("at (UTC)", "after", "state", "attempt", "reason")
    for event in timeline:
        after = (event.at - timeline[0].at).total_seconds()
        attempt = str(event.attempt or "")
        table.add_row(f"{event.at:%Y-%m-%d %H:%M:%S}", f"{after:.2f} s", event.state, attempt, event.reason or "")
    console.print(table)


def age(passed: timedelta) -> str:
    """A duration in its largest whole unit. A negative one, from clocks that differ, counts as 0."""
    seconds = max(0, int(passed.total_seconds()))
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
