"""`reelray database ...`: the schema of the service's database."""

import typer

from deployments.cli.shared import DEFAULT_CONFIG, Config, in_database, print_line
from deployments.settings import load_settings

database = typer.Typer(help="The service's database.", no_args_is_help=True)


@database.callback()
def group() -> None:
    """Keeps `migrate` a subcommand although it is the only one."""


@database.command()
def migrate(config: Config = DEFAULT_CONFIG) -> None:
    """Bring the schema of a PostgreSQL of your own up to date, before a newer Reelray is deployed."""
    from deployments.jobs.database import migrate

    in_database(load_settings(config), migrate)
    print_line("the schema is up to date")
