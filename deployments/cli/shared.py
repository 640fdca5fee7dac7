"""What more than one command needs: common options, the consoles, an open store, and errors in one line."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar
from uuid import UUID

import typer
from pydantic import ValidationError
from rich.console import Console

from deployments.cli.client import QueueClient
from deployments.cli.terminal import Terminal
from deployments.schemas.endpoint import ENDPOINTS, Endpoint
from deployments.schemas.failures import validation_failure
from deployments.settings import Settings, load_settings
from engines.errors import ReelrayError

if TYPE_CHECKING:
    from deployments.jobs.store import JobStore

T = TypeVar("T")

console = Console()
errors = Console(stderr=True)

Config = Annotated[Path, typer.Option("--config", "-c", exists=True, dir_okay=False, help="The service's YAML.")]
DEFAULT_CONFIG = Path("serve_config.yaml")
EndpointId = Annotated[str, typer.Argument(help="E.g. fal-ai/animatediff-sparsectrl-lcm; the part after the slash is enough.")]
RequestId = Annotated[str, typer.Argument(help="As `reelray submit` printed it.")]


def endpoint_named(name: str) -> Endpoint:
    """The endpoint with this id, or with this part after the slash. Raises `typer.BadParameter`."""
    for endpoint in ENDPOINTS.values():
        if name in (endpoint.id, endpoint.model):
            return endpoint
    raise typer.BadParameter(f"{name} is not served; the endpoints are {', '.join(ENDPOINTS)}")


def job_id_of(request_id: str) -> UUID:
    """The id of a request's job. Exits with an error if the text is not an id."""
    try:
        return UUID(request_id)
    except ValueError as exc:
        raise typer.Exit(fail(f"{request_id} is not a request's id")) from exc


def in_database(settings: Settings, work: Callable[[str], Coroutine[Any, Any, T]]) -> T:
    """What `work` returns, given the URL of the service's database. Exits with an error if there is none."""
    import asyncpg

    from deployments.hosting.embedded_postgres import PostgresFailed, database_for_command
    from deployments.jobs.database import StoreAway

    try:
        with database_for_command(settings) as url:
            return asyncio.run(work(url))
    except (OSError, RuntimeError, PostgresFailed, StoreAway, asyncpg.PostgresError, asyncpg.InterfaceError) as exc:
        raise typer.Exit(fail(f"the database cannot be used: {exc}")) from exc


def in_store(config: Path, work: "Callable[[JobStore], Awaitable[T]]") -> T:
    """What `work` returns, given the open job store of the service in `config`. Exits with an error if there is no database."""
    from deployments.jobs.store import JobStore

    settings = load_settings(config)

    async def run(url: str) -> T:
        store = await JobStore.open(url, upgrades=settings.database == "embedded")
        try:
            return await work(store)
        finally:
            await store.close()

    return in_database(settings, run)


def show_progress(client: QueueClient, endpoint_id: str, request_id: str) -> None:
    """Shows the progress until the request is completed."""
    shown = 0
    with Terminal(errors) as terminal:
        for status in client.follow(endpoint_id, request_id):
            for line in status["logs"]:
                if line["seq"] > shown:
                    shown = line["seq"]
                    terminal.line(line["message"], line.get("progress"))
            if status["status"] == "IN_QUEUE":
                terminal.wait(f"queued, {status['queue_position']} ahead")


def output_of(client: QueueClient, endpoint_id: str, request_id: str) -> dict[str, Any]:
    """Waits for a request's output and shows the progress meanwhile."""
    show_progress(client, endpoint_id, request_id)
    return client.result(endpoint_id, request_id)


def keep_video(client: QueueClient, output: dict[str, Any], out: Path | None) -> None:
    """Shows a request's output and, if `out` is given, downloads its video there."""
    console.print_json(data=output)
    if out is not None:
        out.write_bytes(client.download(output["video"]["url"]))
        print_line(out)


@contextmanager
def clear_errors() -> Iterator[None]:
    """Errors that the user can act on are shown in one line, without a traceback."""
    try:
        yield
    except ValidationError as exc:
        raise typer.Exit(fail(validation_failure(exc).error.replace("; ", "\n"))) from exc
    except ReelrayError as exc:
        where = f"{'.'.join(map(str, exc.loc))}: " if exc.loc else ""
        raise typer.Exit(fail(f"{where}{exc.message}")) from exc


def fail(message: str) -> int:
    """Prints an error; returns the exit status, for `typer.Exit`."""
    errors.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
    return 1


def print_line(line: object) -> None:
    """Prints text as it is, without colours or line breaks, so that a script can read it."""
    console.print(str(line), markup=False, highlight=False, soft_wrap=True)
