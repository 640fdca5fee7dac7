"""`reelray keys ...`: the API keys of a service."""

from typing import Annotated

import typer
from rich.table import Table

from deployments.cli.shared import DEFAULT_CONFIG, Config, console, fail, in_store, print_line
from deployments.jobs.keys import DEFAULT_SCOPES, Scope

keys = typer.Typer(help="API keys, for a service with auth: keys in its settings.", no_args_is_help=True)


@keys.command()
def create(
    name: Annotated[str, typer.Argument(help="Who the key is for.")],
    max_running: Annotated[
        int | None, typer.Option(min=1, help="How many of its jobs may run at once; no limit by default.")
    ] = None,
    scope: Annotated[
        list[Scope],
        typer.Option(help="What the key allows; may be repeated. admin: read, and the other scopes for the jobs of every key."),
    ] = list(DEFAULT_SCOPES),  # noqa: B006  # typer wants a list
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Create a key and print its secret, which is not shown again."""
    print_line(in_store(config, lambda store: store.keys.create(name, max_running, list(dict.fromkeys(scope)))))


@keys.command("list")
def list_all(config: Config = DEFAULT_CONFIG) -> None:
    """Show every key, without its secret."""
    table = Table("id", "name", "scopes", "max running", "created", "old secret until", "revoked")
    for key in in_store(config, lambda store: store.keys.list_all()):
        limit = str(key.max_running or "")
        times = (f"{time:%Y-%m-%d %H:%M}" if time else "" for time in (key.created_at, key.old_secret_until, key.revoked_at))
        table.add_row(key.id, key.name, ", ".join(key.scopes), limit, *times)
    console.print(table)


@keys.command()
def rotate(
    key_id: str,
    overlap_h: Annotated[
        float,
        typer.Option("--overlap-hours", min=0, help="How long the old secret stays valid. 0: not at all, e.g. if stolen."),
    ] = 24.0,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Give a key a new secret, and print it: it is not shown again. The key keeps its jobs."""
    secret = in_store(config, lambda store: store.keys.rotate(key_id, overlap_h * 3600))
    if secret is None:
        raise typer.Exit(fail(f"there is no key {key_id}"))
    print_line(secret)


@keys.command()
def revoke(key_id: str, config: Config = DEFAULT_CONFIG) -> None:
    """Revoke a key; it is refused within seconds."""
    if not in_store(config, lambda store: store.keys.revoke(key_id)):
        raise typer.Exit(fail(f"there is no key {key_id}"))
