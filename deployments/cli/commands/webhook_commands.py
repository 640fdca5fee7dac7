"""`reelray webhooks ...`: a request's webhook, and the key that signs webhooks."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from deployments.cli.shared import DEFAULT_CONFIG, Config, RequestId, console, fail, in_store, job_id_of, print_line

if TYPE_CHECKING:
    from deployments.jobs.store import JobStore

webhooks = typer.Typer(help="The service's webhooks: inspect and resend them, rotate their signing key.", no_args_is_help=True)


@webhooks.command()
def show(request_id: RequestId, config: Config = DEFAULT_CONFIG) -> None:
    """Show the state of a request's webhook, and every attempt to deliver it."""
    from deployments.webhooks.outbox import Attempt, Outbox, Webhook

    job_id = job_id_of(request_id)

    async def read(store: "JobStore") -> tuple[Webhook | None, list[Attempt]]:
        return await Outbox(store.database).get(job_id), await Outbox(store.database).attempts(job_id)

    webhook, attempts = in_store(config, read)
    if webhook is None:
        raise typer.Exit(fail(f"there is no webhook of {request_id}"))
    print_line(f"{webhook.status}: {webhook.url}")
    if webhook.next_attempt_at is not None:
        print_line(f"next attempt {webhook.next_attempt_at:%Y-%m-%d %H:%M:%S}")
    table = Table("at", "attempt", "status", "error", "seconds")
    for tried in attempts:
        status = "" if tried.status is None else str(tried.status)
        table.add_row(f"{tried.at:%Y-%m-%d %H:%M:%S}", str(tried.attempt), status, tried.error or "", f"{tried.duration_s:.2f}")
    console.print(table)


@webhooks.command()
def redeliver(request_id: RequestId, config: Config = DEFAULT_CONFIG) -> None:
    """Send a request's webhook again, even if it was delivered, with all its retries."""
    from deployments.webhooks.outbox import Outbox

    job_id = job_id_of(request_id)
    if not in_store(config, lambda store: Outbox(store.database).redeliver(job_id)):
        raise typer.Exit(fail(f"there is no webhook of {request_id}"))


@webhooks.command()
def rotate_key(
    overlap_h: Annotated[
        float,
        typer.Option(
            "--overlap-hours",
            min=0,
            help="How long the new key is published before it is used, and how long the old ones stay published after that."
            " 0 ends the old ones at once, e.g. a stolen one: receivers that cache keys refuse our webhooks until they fetch"
            " them again.",
        ),
    ] = 25.0,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Create a new key for signing webhooks, and print its id."""
    from deployments.webhooks.outbox import Outbox

    print_line(in_store(config, lambda store: Outbox(store.database).rotate_key(overlap_h * 3600)).id)
