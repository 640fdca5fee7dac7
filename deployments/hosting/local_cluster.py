"""The whole service on this machine, for as long as a `with` block lasts: its own Ray, Serve from the YAML, PostgreSQL.

A cluster does not use this file: there `serve deploy` takes the same YAML, and the operator runs PostgreSQL.
"""

import logging
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import httpx
import ray
import yaml
from ray import serve
from ray.serve._private.api import serve_start
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, HTTPOptionsSchema, ServeDeploySchema

from deployments.hosting import haproxy
from deployments.hosting.embedded_postgres import database_url
from deployments.hosting.guardian import guarded
from deployments.settings import load_settings
from engines.errors import ReelrayError

logger = logging.getLogger(__name__)

READY_TIMEOUT_S = 180.0
PORT_TIMEOUT_S = 5.0
OBJECT_STORE_BYTES = 1_000_000_000
"""Enough for the conditioning and latents of the few jobs in flight; Ray's default is a third of the memory."""


class ServiceFailed(ReelrayError):
    """The service did not start."""


@contextmanager
def running(config: Path, *, host: str | None = None, port: int | None = None, dashboard: bool = False) -> Iterator[str]:
    """Starts everything in `config`, yields the service's URL once it answers, and stops everything.

    At the end, running jobs go back to the queue. Raises `ServiceFailed` with the message of the deployment that failed, and
    `Exposed`.
    """
    schema = ServeDeploySchema.model_validate(yaml.safe_load(config.read_text()))
    schema.http_options.host = host or schema.http_options.host
    schema.http_options.port = schema.http_options.port if port is None else port
    settings = load_settings(config)
    settings.refuse_exposure(schema.http_options.host)
    scheme = "https" if schema.http_options.ssl_certfile else "http"
    url = f"{scheme}://{address_of(schema.http_options.host, schema.http_options.port)}"
    _check_free(schema.http_options.host, schema.http_options.port)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # what fails is in Serve's own log files and in `ServiceFailed`
    names = [app.name for app in schema.applications]
    _exit_on_signals()
    with ExitStack() as stack:  # at the end every step is taken back, whichever of them fails
        stack.enter_context(guarded(settings))
        database_url(settings)
        if stack.enter_context(haproxy.fronted(_certificate(schema.http_options))):
            schema.http_options.ssl_certfile = schema.http_options.ssl_keyfile = None  # HAProxy has them
        stack.callback(_shut_down, names)
        ray.init(
            address="local",
            namespace="serve",
            include_dashboard=dashboard,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=OBJECT_STORE_BYTES,
        )
        _exit_on_signals()  # again: Ray has replaced SIGTERM's handler by one that aborts
        # What `serve run` does; Ray has no public call that deploys a YAML without a dashboard
        client = serve_start(http_options=schema.http_options.model_dump(), proxy_location=schema.proxy_location)
        client.deploy_apps(schema, _blocking=False)
        _wait_until_ready(client, names, url)
        yield url


def _certificate(options: HTTPOptionsSchema) -> bytes:
    """Serve's own TLS options, for HAProxy: the chain and its key. Raises `ServiceFailed`."""
    try:
        return b"\n".join(Path(file).read_bytes() for file in (options.ssl_certfile, options.ssl_keyfile) if file)
    except OSError as exc:
        raise ServiceFailed(f"The certificate or its key cannot be read: {exc}") from exc


def address_of(host: str, port: int) -> str:
    """Host and port as they stand in a URL, where an IPv6 address is in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _check_free(host: str, port: int) -> None:
    """Raises `ServiceFailed` for a taken port, where Serve would wait until its timeout. A killed service frees its port soon."""
    deadline = time.monotonic() + PORT_TIMEOUT_S
    while True:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host, port))
                return
            except OSError as exc:
                if time.monotonic() > deadline:
                    where = address_of(host, port)
                    raise ServiceFailed(f"{where} cannot be listened on: {exc.strerror}. Give another --port.") from exc
        time.sleep(0.2)


def _wait_until_ready(client: Any, names: list[str], url: str) -> None:
    """client: of Serve. `serve.status()` would pickle every deployment's whole configuration, five times a second."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        applications = {name: client.get_serve_status(name).app_status for name in names}
        for name, application in applications.items():
            if application.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
                raise ServiceFailed(f"{name}: {application.message}")
        if all(application.status == ApplicationStatus.RUNNING for application in applications.values()) and _answers(url):
            return
        time.sleep(0.2)
    raise ServiceFailed(f"not ready after {READY_TIMEOUT_S:.0f} s")


def _exit_on_signals() -> None:
    """Has the signals that would end this process unwind its `with` blocks, as Ctrl-C does. SIGHUP: the terminal closes."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, _exit)


def _exit(*_: object) -> NoReturn:
    raise SystemExit(0)


def _shut_down(names: list[str]) -> None:
    """Ends the applications first, so that dispatchers give their jobs back, then Ray with the rest of Serve."""
    if ray.is_initialized():
        try:
            for name in names:
                serve.delete(name)
        except RayServeException:  # Serve had not started
            pass
        except Exception:  # it does not answer; Ray's end is then its end too
            logger.warning("Serve's applications were not stopped", exc_info=True, extra={"action": "serve_not_stopped"})
        finally:
            ray.shutdown()


def _answers(url: str) -> bool:
    try:
        # trust_env=False: a proxy from the shell's environment knows nothing of this machine's loopback. verify=False: it is our
        # own port, and this process need not trust its CA.
        return httpx.get(f"{url}/health", timeout=2.0, trust_env=False, verify=False).is_success
    except httpx.HTTPError:
        return False
