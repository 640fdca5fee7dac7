"""`reelray serve`, `gateway` and `demo`: the service on this machine."""

from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Annotated

import typer

from deployments.cli.client import QueueClient
from deployments.cli.shared import DEFAULT_CONFIG, Config, clear_errors, console, keep_video, output_of, print_line
from deployments.schemas.endpoint import ENDPOINTS
from deployments.settings import load_settings


def serve(
    config: Config = DEFAULT_CONFIG,
    host: Annotated[str | None, typer.Option(help="Overrides the YAML's.")] = None,
    port: Annotated[int | None, typer.Option(help="Overrides the YAML's.")] = None,
    dashboard: Annotated[bool, typer.Option(help="Start Ray's dashboard as well.")] = False,
) -> None:
    """Run the whole service on this machine until interrupted."""
    from deployments.hosting.embedded_postgres import keep_running
    from deployments.hosting.local_cluster import running

    with clear_errors(), running(config, host=host, port=port, dashboard=dashboard) as url:
        console.print(f"Reelray answers at {url}; its API is described at {url}/docs. Ctrl-C stops it.")
        with suppress(KeyboardInterrupt):
            keep_running(load_settings(config))


def gateway(
    config: Config = DEFAULT_CONFIG,
    host: str = "127.0.0.1",
    port: int = 8001,
    workers: Annotated[int, typer.Option(min=1, help="Number of processes.")] = 1,
    tls: Annotated[Path | None, typer.Option(help="Speak https, with the files that `reelray tls` wrote to this folder.")] = None,
) -> None:
    """Run only the ingress, beside the cluster: it accepts and answers requests while Ray is down."""
    from deployments.hosting.gateway import run

    with clear_errors():
        run(config, host, port, workers, tls)


def demo(config: Config = DEFAULT_CONFIG, port: Annotated[int | None, typer.Option(help="Overrides the YAML's.")] = None) -> None:
    """Start the service, render one video per endpoint through the queue with a sheet of its frames, and stop."""
    from deployments.hosting.demo_weights import demo_inputs
    from deployments.hosting.local_cluster import running
    from engines.media.contact_sheet import write_contact_sheet

    made: list[Path] = []
    folder = load_settings(config).home / "demo"
    folder.mkdir(parents=True, exist_ok=True)
    with clear_errors(), ExitStack() as stack:
        with console.status("starting PostgreSQL, Ray and the three stages"):
            url = stack.enter_context(running(config, port=port))
            client = stack.enter_context(QueueClient(url))
        for endpoint_id, job_input in demo_inputs().items():
            output = output_of(client, endpoint_id, client.submit(endpoint_id, job_input))
            video = folder / f"{ENDPOINTS[endpoint_id].model}.mp4"
            keep_video(client, output, video)
            write_contact_sheet(video, sheet := video.with_suffix(".png"))
            made += [video, sheet]
    console.print("The videos, and their frames side by side:")
    for path in made:
        print_line(path)
