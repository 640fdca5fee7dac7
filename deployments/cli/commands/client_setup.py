"""`reelray tls`, `connect` and `env`: what leads fal's clients to this service."""

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from deployments.cli.shared import clear_errors, console, fail, print_line

TLS_FOLDER = Path("tls")
CONNECT_PORT = 8002
TlsFolder = Annotated[Path, typer.Option("--tls", help="The folder that `reelray tls` wrote.", file_okay=False)]


class Client(StrEnum):
    """A client of fal's."""

    JS = "js"
    PYTHON = "python"


def tls(
    folder: Annotated[Path, typer.Argument(help="Where to write them.", file_okay=False)] = TLS_FOLDER,
    host: Annotated[list[str] | None, typer.Option(help="Another name or address that clients use; may be repeated.")] = None,
    replace: Annotated[bool, typer.Option(help="Replace a CA that clients trust already.")] = False,
) -> None:
    """Write a development CA and a certificate for this machine and for fal's host names."""
    from deployments.hosting.tls import write_certificate

    with clear_errors():
        files = write_certificate(folder, tuple(host or ()), replaces=replace)
    print_line(f"For servers: reelray gateway --tls {folder}, or in the YAML of reelray serve")
    print_line(f"  http_options: {{ ssl_certfile: {files.chain}, ssl_keyfile: {files.key} }}")
    print_line(f"For clients to trust: {files.ca}")
    print_line(f"For clients that trust one file only, with the public CAs in it as well: {files.bundle}")


def connect(
    to: Annotated[str, typer.Option(help="Host and TLS port of the service.")] = "127.0.0.1:8443",
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Where to listen.")] = CONNECT_PORT,
) -> None:
    """Run the proxy that leads fal's host names to the service, for clients with HTTPS_PROXY."""
    import asyncio

    from deployments.hosting.connect_listener import listen

    target = urlsplit(f"//{to}")
    if target.hostname is None or target.port is None:
        raise typer.BadParameter("must be a host and a port, e.g. 127.0.0.1:8443", param_hint="--to")

    async def serve(to_host: str, to_port: int) -> None:
        server = await listen(host, port, to_host, to_port)
        console.print(f"HTTPS_PROXY=http://{host}:{port} leads fal's hosts to {to}. Ctrl-C stops it.")
        await server.serve_forever()

    try:
        asyncio.run(serve(target.hostname, target.port))
    except KeyboardInterrupt:
        pass
    except OSError as exc:
        raise typer.Exit(fail(f"{host}:{port} cannot be listened on: {exc.strerror}")) from exc


def env(
    client: Annotated[Client, typer.Option(help="Whose settings.")],
    url: Annotated[str | None, typer.Option(help="The service's URL; https for Python.")] = None,
    tls: TlsFolder = TLS_FOLDER,
    connect: Annotated[str | None, typer.Option(help="Host and port of `reelray connect`, for uploads from Python.")] = None,
) -> None:
    """Print the settings that lead one of fal's clients to this service, ready to be pasted."""
    from deployments.hosting.tls import TlsFiles

    if client is Client.JS:
        print_line(_javascript((url or "http://127.0.0.1:8000").rstrip("/"), TlsFiles.within(tls).ca))
        return
    url = (url or "https://127.0.0.1:8443").rstrip("/")
    if urlsplit(url).scheme != "https":
        raise typer.Exit(fail("fal's Python client speaks https only: give the URL of a TLS port, e.g. of reelray gateway --tls"))
    print_line(_python(python_settings(url.removeprefix("https://"), TlsFiles.within(tls).bundle, connect)))


def _javascript(url: str, ca: Path) -> str:
    """Recipe J1."""
    trust = f"// start Node with NODE_EXTRA_CA_CERTS={shlex.quote(str(ca))}\n" if url.startswith("https:") else ""
    return trust + f'fal.config({{ proxyUrl: {{ url: "{url}/api/fal/proxy", when: "always" }} }});'


def python_settings(address: str, trusted: Path, connect: str | None = None) -> dict[str, str]:
    """Recipe P1 as environment variables, and with `connect` P2 on top of it. address: host and TLS port of the service."""
    settings = {"FAL_RUN_HOST": f"{address}/run", "FAL_QUEUE_RUN_HOST": f"{address}/queue", "SSL_CERT_FILE": str(trusted)}
    if connect is not None:
        settings |= {"HTTPS_PROXY": f"http://{connect}", "NO_PROXY": "127.0.0.1,localhost,::1"}
    return settings


def _python(settings: dict[str, str]) -> str:
    lines = [f"export {name}={shlex.quote(value)}" for name, value in settings.items()]
    return "\n".join(["export FAL_KEY=${FAL_KEY:-anything}  # with auth: keys, one of `reelray keys create`", *lines])
