"""`reelray engines ...`: tables of what `engine_admin.py` builds, finds and verifies."""

from typing import Annotated

import typer
from rich.table import Table

from deployments.cli.shared import DEFAULT_CONFIG, Config, clear_errors, console, fail
from deployments.settings import load_settings

NO_ENGINES = "no endpoint has an engine other than eager: set engine.back_end in its settings"

engines = typer.Typer(help="The engines that run the UNets: build, list and check them on this machine.", no_args_is_help=True)


@engines.command()
def build(config: Config = DEFAULT_CONFIG) -> None:
    """Build the configured engines, as replicas do when they start, so that replicas find them ready."""
    from deployments.cli import engine_admin

    settings, table, faults = load_settings(config), Table("model", "call", "engine", "why not the configured one"), 0
    with clear_errors(), console.status("building; this takes minutes at full size"):
        for made in engine_admin.build(settings):
            table.add_row(made.model, made.call, made.engine, made.fault)
            faults += bool(made.fault)
    if not table.row_count:
        raise typer.Exit(fail(NO_ENGINES))
    console.print(table)
    if faults:
        raise typer.Exit(1)


@engines.command("list")
def list_plans(config: Config = DEFAULT_CONFIG) -> None:
    """Show the TensorRT plans on this machine. Each file is read and checked."""
    from deployments.cli import engine_admin

    table = Table("plan", "GPU", "library", "precision", "profiles", "weights", "MB", "state")
    damaged = False
    with clear_errors():
        for entry in engine_admin.plans(load_settings(config)):
            key, size = entry.key, f"{entry.size_bytes / 1e6:.0f}"
            if key is None:
                damaged = True
                table.add_row(entry.digest[:12], "", "", "", "", "", size, "damaged")
            else:
                about = (key.gpu.name, f"{key.library} {key.version}", key.precision, str(len(key.profiles)), key.weights[:12])
                table.add_row(entry.digest[:12], *about, size, "whole")
    console.print(table)
    if damaged:
        raise typer.Exit(1)


@engines.command()
def inspect(
    plan: Annotated[str, typer.Argument(help="The first digits of its name, as `engines list` shows it.")],
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Show everything that a plan was built from and, on a GPU with TensorRT, its layers and memory."""
    from deployments.cli import engine_admin

    with clear_errors():
        console.print_json(data=engine_admin.inspect(load_settings(config), plan))


@engines.command()
def verify(config: Config = DEFAULT_CONFIG) -> None:
    """Compare every configured engine with PyTorch's modules on the same noise; fails if one is missing or differs too much."""
    from deployments.cli import engine_admin

    table = Table("model", "call", "frames x height x width", "difference", "at most", "")
    good = True
    with clear_errors(), console.status("running engines and modules"):
        for found in engine_admin.verify(load_settings(config)):
            if isinstance(found, engine_admin.Verified):
                cells = (found.shape, f"{found.difference:.1e}", f"{found.tolerance:.0e}", "" if found.holds else "too far")
            else:
                cells = ("", "", "", f"missing: {found.fault}")
            table.add_row(found.model, found.call, *cells)
            good = good and isinstance(found, engine_admin.Verified) and found.holds
    if not table.row_count:
        raise typer.Exit(fail(NO_ENGINES))
    console.print(table)
    if not good:
        raise typer.Exit(1)
