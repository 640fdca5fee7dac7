"""The console command `reelray`. Heavy imports stand inside the commands, so that `reelray status` starts at once."""

import asyncio
import base64
import json
import mimetypes
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar
from uuid import UUID

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from deployments.cli.client import QueueClient
from deployments.cli.terminal import Terminal
from deployments.jobs.keys import DEFAULT_SCOPES, Scope
from deployments.schemas.endpoint import ENDPOINTS, Endpoint
from deployments.schemas.failures import validation_failure
from deployments.settings import load_settings
from deployments.stages.protocol import Note
from engines.errors import ReelrayError

if TYPE_CHECKING:
    from deployments.jobs.store import JobStore, QueueStatus

T = TypeVar("T")

app = typer.Typer(help="Video generation as a service on your own GPUs.", no_args_is_help=True, pretty_exceptions_enable=False)
keys = typer.Typer(help="API keys, for a service whose settings say auth: keys.", no_args_is_help=True)
app.add_typer(keys, name="keys")
queue = typer.Typer(help="The endpoints' queues, for the operator.", no_args_is_help=True)
app.add_typer(queue, name="queue")
webhooks = typer.Typer(help="The webhooks that the service delivers.", no_args_is_help=True)
app.add_typer(webhooks, name="webhooks")
engines = typer.Typer(help="What runs the UNets: built, listed and checked on this machine.", no_args_is_help=True)
app.add_typer(engines, name="engines")

console = Console()
errors = Console(stderr=True)

Config = Annotated[Path, typer.Option("--config", "-c", exists=True, dir_okay=False, help="The service's YAML.")]
DEFAULT_CONFIG = Path("serve_config.yaml")
DRAIN_POLL_S = 0.5
NO_ENGINES = "no endpoint has an engine other than eager: set engine.back_end in its settings"
EndpointId = Annotated[str, typer.Argument(help="E.g. fal-ai/animatediff-sparsectrl-lcm; the part after the slash will do.")]
RequestId = Annotated[str, typer.Argument(help="As `reelray submit` printed it.")]
Url = Annotated[str, typer.Option(help="Where the service is.")]
DEFAULT_URL = "http://127.0.0.1:8000"
Key = Annotated[str | None, typer.Option(envvar="FAL_KEY", help="API key, where the service asks for one.")]
InputFile = Annotated[
    Path, typer.Option("--input", "-i", exists=True, dir_okay=False, help="The input as JSON; file URLs may be paths beside it.")
]
Out = Annotated[Path | None, typer.Option("--out", "-o", dir_okay=False, help="Where to keep the video.")]


@app.command("serve")
def serve_command(
    config: Config = DEFAULT_CONFIG,
    host: Annotated[str | None, typer.Option(help="Instead of the YAML's.")] = None,
    port: Annotated[int | None, typer.Option(help="Instead of the YAML's.")] = None,
    dashboard: Annotated[bool, typer.Option(help="Ray's dashboard as well.")] = False,
) -> None:
    """Run the whole service on this machine until interrupted."""
    from deployments.hosting.embedded_postgres import keep_running
    from deployments.hosting.local_cluster import running

    with _clear_errors(), running(config, host=host, port=port, dashboard=dashboard) as url:
        console.print(f"Reelray answers at {url}; its API is described at {url}/docs. Ctrl-C stops it.")
        with suppress(KeyboardInterrupt):
            keep_running(load_settings(config))


@app.command()
def gateway(
    config: Config = DEFAULT_CONFIG,
    host: str = "127.0.0.1",
    port: int = 8001,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
) -> None:
    """Host the ingress alone, beside the cluster: it keeps accepting and answering while Ray is down."""
    from deployments.hosting.gateway import run

    with _clear_errors():
        run(config, host, port, workers)


@app.command()
def render(
    model: Annotated[str, typer.Argument(help="E.g. animatediff-sparsectrl-lcm.")],
    input_file: InputFile,
    out: Annotated[Path, typer.Option("--out", "-o", dir_okay=False, help="The mp4 to write.")],
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Render one video in this process, without Ray, queue or database."""
    from deployments.cli.local_render import render_locally

    endpoint = _endpoint(model)
    with _clear_errors(), Terminal(errors) as terminal:

        def show(note: Note) -> None:
            terminal.line(note.message, note.progress.fields() if note.progress else None)

        terminal.wait("loading the model")
        clip = render_locally(endpoint, json.dumps(read_input(input_file)).encode(), load_settings(config), show)
        out.write_bytes(clip.mp4)
    console.print(f"{out}: {clip.num_frames} frames, {clip.width}x{clip.height}, seed {clip.seed}")


@app.command()
def submit(
    endpoint: EndpointId,
    input_file: InputFile,
    watch: Annotated[bool, typer.Option(help="Wait for the video and show the progress.")] = False,
    out: Out = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Queue a request and print its id."""
    endpoint_id = _endpoint(endpoint).id
    with _clear_errors(), QueueClient(url, key) as client:
        request_id = client.submit(endpoint_id, read_input(input_file))
        _print(request_id)
        if watch or out:
            _keep_video(client, _follow(client, endpoint_id, request_id), out)


@app.command()
def status(
    endpoint: EndpointId,
    request_id: RequestId,
    logs: bool = False,
    watch: Annotated[bool, typer.Option(help="Show the progress until it is completed, first.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Show where a request stands."""
    endpoint_id = _endpoint(endpoint).id
    with _clear_errors(), QueueClient(url, key) as client:
        if watch:
            _watch(client, endpoint_id, request_id)
        console.print_json(data=client.status(endpoint_id, request_id, logs=logs))


@app.command()
def result(endpoint: EndpointId, request_id: RequestId, out: Out = None, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Show a completed request's output, and keep its video."""
    with _clear_errors(), QueueClient(url, key) as client:
        _keep_video(client, client.result(_endpoint(endpoint).id, request_id), out)


@app.command()
def cancel(endpoint: EndpointId, request_id: RequestId, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Take a request out of the queue, or stop it."""
    with _clear_errors(), QueueClient(url, key) as client:
        _print(client.cancel(_endpoint(endpoint).id, request_id))


@app.command("demo-weights")
def demo_weights(folder: Annotated[Path, typer.Argument(file_okay=False)]) -> None:
    """Write the tiny demo checkpoints of every model, in the layouts of the real ones, and inputs to try them on."""
    from deployments.hosting.demo_weights import write_demo

    write_demo(folder)
    _print(folder)


@app.command("convert-weights")
def convert_weights(
    source: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A pickle of tensors: .bin, .pth, .ckpt.")],
    target: Annotated[Path, typer.Argument(dir_okay=False, help="The .safetensors file to write.")],
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None, typer.Option(help="To store them in; their own by default.")
    ] = None,
) -> None:
    """Turn a published pickle into safetensors, by a reader that executes nothing in it."""
    from engines.convert import convert_weights

    with _clear_errors():
        tensors = convert_weights(source, target, dtype)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    console.print(f"{target}: {len(tensors)} tensors, {parameters / 1e6:.2f} M parameters", soft_wrap=True, highlight=False)


@app.command()
def demo(
    config: Config = DEFAULT_CONFIG, port: Annotated[int | None, typer.Option(help="Instead of the YAML's.")] = None
) -> None:
    """Start the service, render one video per endpoint through the queue, and stop."""
    from deployments.hosting.demo_weights import demo_inputs
    from deployments.hosting.local_cluster import running

    folder = load_settings(config).home / "demo"
    folder.mkdir(parents=True, exist_ok=True)
    with _clear_errors(), ExitStack() as stack:
        with console.status("starting PostgreSQL, Ray and the three stages"):
            url = stack.enter_context(running(config, port=port))
            client = stack.enter_context(QueueClient(url))
        for endpoint_id, job_input in demo_inputs().items():
            output = _follow(client, endpoint_id, client.submit(endpoint_id, job_input))
            _keep_video(client, output, folder / f"{ENDPOINTS[endpoint_id].model}.mp4")
            console.print(f"{output['video']['url']} (while the service runs: make serve)")


@keys.command("create")
def keys_create(
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
    _print(_in_store(config, lambda store: store.keys.create(name, max_running, list(dict.fromkeys(scope)))))


@keys.command("list")
def keys_list(config: Config = DEFAULT_CONFIG) -> None:
    """Show every key, without its secret."""
    table = Table("id", "name", "scopes", "max running", "created", "old secret until", "revoked")
    for key in _in_store(config, lambda store: store.keys.list_all()):
        limit = str(key.max_running or "")
        times = (f"{time:%Y-%m-%d %H:%M}" if time else "" for time in (key.created_at, key.old_secret_until, key.revoked_at))
        table.add_row(key.id, key.name, ", ".join(key.scopes), limit, *times)
    console.print(table)


@keys.command("rotate")
def keys_rotate(
    key_id: str,
    overlap_h: Annotated[
        float,
        typer.Option("--overlap-hours", min=0, help="How long the old secret is still good. 0: not at all, it was stolen."),
    ] = 24.0,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Give a key another secret and print it, this once; its jobs stay its own."""
    secret = _in_store(config, lambda store: store.keys.rotate(key_id, overlap_h * 3600))
    if secret is None:
        raise typer.Exit(_fail(f"there is no key {key_id}"))
    _print(secret)


@keys.command("revoke")
def keys_revoke(key_id: str, config: Config = DEFAULT_CONFIG) -> None:
    """End a key; it is refused within seconds."""
    if not _in_store(config, lambda store: store.keys.revoke(key_id)):
        raise typer.Exit(_fail(f"there is no key {key_id}"))


@queue.command("pause")
def queue_pause(
    endpoint: EndpointId,
    drain: Annotated[bool, typer.Option(help="Wait until none of its jobs runs any more.")] = False,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Start no more jobs of an endpoint; those that run go on, and submissions are accepted and wait."""
    endpoint_id = _endpoint(endpoint).id

    async def pause(store: "JobStore") -> "QueueStatus":
        await store.pause(endpoint_id)
        while True:
            status = await store.queue_status(endpoint_id)
            if not (drain and status.running):
                return status
            await asyncio.sleep(DRAIN_POLL_S)

    _print(_described(endpoint_id, _in_store(config, pause)))


@queue.command("resume")
def queue_resume(endpoint: EndpointId, config: Config = DEFAULT_CONFIG) -> None:
    """Start jobs of a paused endpoint again."""
    endpoint_id = _endpoint(endpoint).id
    if not _in_store(config, lambda store: store.resume(endpoint_id)):
        raise typer.Exit(_fail(f"{endpoint_id} is not paused"))


@queue.command("status")
def queue_status(endpoint: EndpointId, config: Config = DEFAULT_CONFIG) -> None:
    """Show how many jobs of an endpoint wait and run, and whether it is paused."""
    endpoint_id = _endpoint(endpoint).id
    _print(_described(endpoint_id, _in_store(config, lambda store: store.queue_status(endpoint_id))))


def _described(endpoint_id: str, status: "QueueStatus") -> str:
    state = f"paused since {status.paused_at:%Y-%m-%d %H:%M:%S} UTC" if status.paused_at else "open"
    delayed = f" ({status.delayed} for another attempt)" if status.delayed else ""
    return f"{endpoint_id}: {state}, {status.queued} waiting{delayed}, {status.running} running"


@engines.command("build")
def engines_build(config: Config = DEFAULT_CONFIG) -> None:
    """Make the configured engines ready, as replicas do at their start, so that those find them."""
    from deployments.cli.engine_admin import build

    settings, table, faults = load_settings(config), Table("model", "call", "engine", "why not the one asked for"), 0
    with _clear_errors(), console.status("building; this takes minutes at full size"):
        for made in build(settings):
            table.add_row(made.model, made.call, made.engine, made.fault)
            faults += bool(made.fault)
    if not table.row_count:
        raise typer.Exit(_fail(NO_ENGINES))
    console.print(table)
    if faults:
        raise typer.Exit(1)


@engines.command("list")
def engines_list(config: Config = DEFAULT_CONFIG) -> None:
    """Show the TensorRT plans on this machine. Each file is read and checked."""
    from deployments.cli.engine_admin import plans

    table = Table("plan", "GPU", "library", "precision", "profiles", "weights", "MB", "state")
    damaged = False
    with _clear_errors():
        for entry in plans(load_settings(config)):
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


@engines.command("inspect")
def engines_inspect(
    plan: Annotated[str, typer.Argument(help="The first digits of its name, as `engines list` shows it.")],
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Show all that shaped a plan and, on a GPU with TensorRT, its layers and memory."""
    from deployments.cli.engine_admin import inspect

    with _clear_errors():
        console.print_json(data=inspect(load_settings(config), plan))


@engines.command("verify")
def engines_verify(config: Config = DEFAULT_CONFIG) -> None:
    """Run every configured engine against the modules on the same noise; fails if one is missing or further off than rounding."""
    from deployments.cli.engine_admin import Verified, verify

    table = Table("model", "call", "frames x height x width", "difference", "at most", "")
    good = True
    with _clear_errors(), console.status("running engines and modules"):
        for found in verify(load_settings(config)):
            if isinstance(found, Verified):
                cells = (found.shape, f"{found.difference:.1e}", f"{found.tolerance:.0e}", "" if found.holds else "too far")
            else:
                cells = ("", "", "", f"missing: {found.fault}")
            table.add_row(found.model, found.call, *cells)
            good = good and isinstance(found, Verified) and found.holds
    if not table.row_count:
        raise typer.Exit(_fail(NO_ENGINES))
    console.print(table)
    if not good:
        raise typer.Exit(1)


@webhooks.command("show")
def webhooks_show(request_id: RequestId, config: Config = DEFAULT_CONFIG) -> None:
    """Show how it stands with a request's webhook, and every attempt."""
    from deployments.webhooks.outbox import Attempt, Outbox, Webhook

    job_id = _job_id(request_id)

    async def read(store: "JobStore") -> tuple[Webhook | None, list[Attempt]]:
        return await Outbox(store.database).get(job_id), await Outbox(store.database).attempts(job_id)

    webhook, attempts = _in_store(config, read)
    if webhook is None:
        raise typer.Exit(_fail(f"there is no webhook of {request_id}"))
    _print(f"{webhook.status}: {webhook.url}")
    if webhook.next_attempt_at is not None:
        _print(f"next attempt {webhook.next_attempt_at:%Y-%m-%d %H:%M:%S}")
    table = Table("at", "attempt", "status", "error", "seconds")
    for tried in attempts:
        status = "" if tried.status is None else str(tried.status)
        table.add_row(f"{tried.at:%Y-%m-%d %H:%M:%S}", str(tried.attempt), status, tried.error or "", f"{tried.duration_s:.2f}")
    console.print(table)


@webhooks.command("redeliver")
def webhooks_redeliver(request_id: RequestId, config: Config = DEFAULT_CONFIG) -> None:
    """Send a request's webhook again, delivered or not, with all its retries."""
    from deployments.webhooks.outbox import Outbox

    job_id = _job_id(request_id)
    if not _in_store(config, lambda store: Outbox(store.database).redeliver(job_id)):
        raise typer.Exit(_fail(f"there is no webhook of {request_id}"))


@webhooks.command("rotate-key")
def webhooks_rotate_key(
    overlap_h: Annotated[
        float,
        typer.Option(
            "--overlap-hours",
            min=0,
            help="How long the new key is published before it signs, and the old ones after that. 0 ends the old ones at once:"
            " for a key that was stolen; receivers that keep keys refuse our webhooks until they fetch them anew.",
        ),
    ] = 25.0,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Make a new key to sign webhooks with, and print its id."""
    from deployments.webhooks.outbox import Outbox

    _print(_in_store(config, lambda store: Outbox(store.database).rotate_key(overlap_h * 3600)).id)


def read_input(path: Path) -> Any:
    """The JSON in a file. Values of `*_url` fields that name a file beside it become data URIs: the service cannot read it."""
    try:
        job_input = json.loads(path.read_text())
    except ValueError as exc:
        raise typer.Exit(_fail(f"{path} is not JSON: {exc}")) from exc
    if isinstance(job_input, dict):
        for field, value in job_input.items():
            # a URL is not looked up as a path: a data URI is longer than a file's name may be
            is_path = field.endswith("_url") and isinstance(value, str) and not re.match(r"(https?|data):", value, re.IGNORECASE)
            if is_path and (local := path.parent / value).is_file():
                kind = mimetypes.guess_type(local.name)[0] or "application/octet-stream"
                job_input[field] = f"data:{kind};base64,{base64.b64encode(local.read_bytes()).decode()}"
    return job_input


def _endpoint(name: str) -> Endpoint:
    for endpoint in ENDPOINTS.values():
        if name in (endpoint.id, endpoint.model):
            return endpoint
    raise typer.BadParameter(f"{name} is not served; there are {', '.join(ENDPOINTS)}")


def _follow(client: QueueClient, endpoint_id: str, request_id: str) -> dict[str, Any]:
    """The output, its progress in the meantime."""
    _watch(client, endpoint_id, request_id)
    return client.result(endpoint_id, request_id)


def _watch(client: QueueClient, endpoint_id: str, request_id: str) -> None:
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


def _keep_video(client: QueueClient, output: dict[str, Any], out: Path | None) -> None:
    console.print_json(data=output)
    if out is not None:
        out.write_bytes(client.download(output["video"]["url"]))
        _print(out)


def _in_store(config: Path, work: "Callable[[JobStore], Awaitable[T]]") -> T:
    from deployments.hosting.embedded_postgres import database_for_command
    from deployments.jobs.store import JobStore

    async def run(url: str) -> T:
        store = await JobStore.open(url)
        try:
            return await work(store)
        finally:
            await store.close()

    try:
        with database_for_command(load_settings(config)) as url:
            return asyncio.run(run(url))
    except (OSError, RuntimeError) as exc:
        raise typer.Exit(_fail(f"the database cannot be reached: {exc}")) from exc


def _job_id(request_id: str) -> UUID:
    try:
        return UUID(request_id)
    except ValueError as exc:
        raise typer.Exit(_fail(f"{request_id} is not a request's id")) from exc


@contextmanager
def _clear_errors() -> Iterator[None]:
    """What the user can mend is told in a line, without a traceback."""
    try:
        yield
    except ValidationError as exc:
        raise typer.Exit(_fail(validation_failure(exc).error.replace("; ", "\n"))) from exc
    except ReelrayError as exc:
        where = f"{'.'.join(map(str, exc.loc))}: " if exc.loc else ""
        raise typer.Exit(_fail(f"{where}{exc.message}")) from exc


def _fail(message: str) -> int:
    errors.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
    return 1


def _print(line: object) -> None:
    """A bare line, for a script to read."""
    console.print(str(line), markup=False, highlight=False, soft_wrap=True)
