"""`reelray keys ...`: the API keys of a service."""

from typing import Annotated

import typer
from rich.table import Table

from deployments.cli.shared import DEFAULT_CONFIG, Config, console, fail, in_store, print_line
from deployments.jobs.keys import DEFAULT_SCOPES, Scope

keys = typer.Typer(help="API keys, for a service whose settings say auth: keys.", no_args_is_help=True)


@keys.command()
def create(
    name: Annotated[str, typer.Argument(help="Whose it is.")],
    max_running: Annotated[
        int | None, typer.Option(min=1, help="Most of its jobs that run at once; no limit by default.")
    ] = None,
    scope: Annotated[
        list[Scope],
        typer.Option(help="What it may do; may be repeated. admin: read, and the rest, for the jobs of every key."),
    ] = list(DEFAULT_SCOPES),  # noqa: B006  # typer wants a list
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Make a key and print its secret, this once."""
    print_line(in_store(config, lambda store: store.create_key(name, max_running, list(dict.fromkeys(scope)))))


@keys.command("list")
def list_all(config: Config = DEFAULT_CONFIG) -> None:
    """Show every key, without its secret."""
    table = Table("id", "name", "scopes", "max running", "created", "old secret until", "revoked")
    for key in in_store(config, lambda store: store.list_keys()):
        limit = str(key.max_running or "")
        times = (f"{time:%Y-%m-%d %H:%M}" if time else "" for time in (key.created_at, key.old_secret_until, key.revoked_at))
        table.add_row(key.id, key.name, ", ".join(key.scopes), limit, *times)
    console.print(table)


@keys.command()
def rotate(
    key_id: str,
    overlap_h: Annotated[
        float,
        typer.Option("--overlap-hours", min=0, help="How long the old secret is still good. 0: not at all, it was stolen."),
    ] = 24.0,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Give a key another secret and print it, this once; its jobs stay its own."""
    secret = in_store(config, lambda store: store.rotate_key(key_id, overlap_h * 3600))
    if secret is None:
        raise typer.Exit(fail(f"there is no key {key_id}"))
    print_line(secret)


@keys.command()
def revoke(key_id: str, config: Config = DEFAULT_CONFIG) -> None:
    """End a key; it is refused within seconds."""
    if not in_store(config, lambda store: store.revoke_key(key_id)):
        raise typer.Exit(fail(f"there is no key {key_id}"))
