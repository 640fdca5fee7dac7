"""`reelray submit`, `status`, `result` and `cancel`, which call a running service, and `render`, which needs none."""

import base64
import json
import mimetypes
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from deployments.cli.client import QueueClient
from deployments.cli.shared import (
    DEFAULT_CONFIG,
    Config,
    EndpointId,
    RequestId,
    clear_errors,
    console,
    endpoint_named,
    errors,
    fail,
    keep_video,
    output_of,
    print_line,
    show_progress,
)
from deployments.cli.terminal import Terminal
from deployments.settings import load_settings
from deployments.stages.protocol import Note

DEFAULT_URL = "http://127.0.0.1:8000"
Url = Annotated[str, typer.Option(help="The service's address.")]
Key = Annotated[str | None, typer.Option(envvar="FAL_KEY", help="API key, if the service requires one.")]
InputFile = Annotated[
    Path,
    typer.Option("--input", "-i", exists=True, dir_okay=False, help="The input as JSON; its URLs may be relative paths."),
]
Out = Annotated[Path | None, typer.Option("--out", "-o", dir_okay=False, help="Where to save the video.")]


def render(
    model: Annotated[str, typer.Argument(help="E.g. animatediff-sparsectrl-lcm.")],
    input_file: InputFile,
    out: Annotated[Path, typer.Option("--out", "-o", dir_okay=False, help="The mp4 to write.")],
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Render one video in this process, without Ray, queue or database."""
    from deployments.cli.local_render import render_locally

    endpoint = endpoint_named(model)
    with clear_errors(), Terminal(errors) as terminal:

        def show(note: Note) -> None:
            terminal.line(note.message, note.progress.fields() if note.progress else None)

        terminal.wait("loading the model")
        clip = render_locally(endpoint, json.dumps(read_input(input_file)).encode(), load_settings(config), show)
        out.write_bytes(clip.mp4)
    console.print(f"{out}: {clip.num_frames} frames, {clip.width}x{clip.height}, seed {clip.seed}")


def submit(
    endpoint: EndpointId,
    input_file: InputFile,
    watch: Annotated[bool, typer.Option(help="Wait for the video and show the progress.")] = False,
    out: Out = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Queue a request and print its id."""
    endpoint_id = endpoint_named(endpoint).id
    with clear_errors(), QueueClient(url, key) as client:
        request_id = client.submit(endpoint_id, read_input(input_file))
        print_line(request_id)
        if watch or out:
            keep_video(client, output_of(client, endpoint_id, request_id), out)


def status(
    endpoint: EndpointId,
    request_id: RequestId,
    logs: bool = False,
    watch: Annotated[bool, typer.Option(help="First show the progress until the request is completed.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Show where a request stands."""
    endpoint_id = endpoint_named(endpoint).id
    with clear_errors(), QueueClient(url, key) as client:
        if watch:
            show_progress(client, endpoint_id, request_id)
        console.print_json(data=client.status(endpoint_id, request_id, logs=logs))


def result(endpoint: EndpointId, request_id: RequestId, out: Out = None, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Show a completed request's output, and save its video with --out."""
    with clear_errors(), QueueClient(url, key) as client:
        keep_video(client, client.result(endpoint_named(endpoint).id, request_id), out)


def cancel(endpoint: EndpointId, request_id: RequestId, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Take a request out of the queue, or stop it."""
    with clear_errors(), QueueClient(url, key) as client:
        print_line(client.cancel(endpoint_named(endpoint).id, request_id))


def read_input(path: Path) -> Any:
    """The JSON in a file. Paths in its `*_url` fields, relative to it, become data URIs: the service could not read the files."""
    try:
        job_input = json.loads(path.read_text())
    except ValueError as exc:
        raise typer.Exit(fail(f"{path} is not JSON: {exc}")) from exc
    if isinstance(job_input, dict):
        for field, value in job_input.items():
            # URLs are not looked up as paths: a data URI is longer than the file system allows
            is_path = field.endswith("_url") and isinstance(value, str) and not re.match(r"(https?|data):", value, re.IGNORECASE)
            if is_path and (local := path.parent / value).is_file():
                kind = mimetypes.guess_type(local.name)[0] or "application/octet-stream"
                job_input[field] = f"data:{kind};base64,{base64.b64encode(local.read_bytes()).decode()}"
    return job_input
