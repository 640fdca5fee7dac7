"""The whole service on this machine, for as long as a `with` block lasts: its own Ray, Serve from the YAML, PostgreSQL.

A cluster does not use this file: there `serve deploy` takes the same YAML, and the operator runs PostgreSQL.
"""

import logging
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import httpx
import ray
import yaml
from ray import serve
from ray.serve._private.api import serve_start
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, ServeDeploySchema

from deployments.hosting import haproxy
from deployments.hosting.embedded_postgres import database_url, stop_embedded
from deployments.settings import load_settings
from engines.errors import ReelrayError

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
    _check_free(schema.http_options.host, schema.http_options.port)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # what fails is in Serve's own log files and in `ServiceFailed`
    signal.signal(signal.SIGTERM, _exit)
    database_url(settings)
    front = ExitStack()
    try:
        front.enter_context(haproxy.fronted())
        ray.init(
            address="local",
            namespace="serve",
            include_dashboard=dashboard,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=OBJECT_STORE_BYTES,
        )
        signal.signal(signal.SIGTERM, _exit)  # again: Ray has replaced it by one that aborts
        # What `serve run` does; Ray has no public call that deploys a YAML without a dashboard
        client = serve_start(http_options=schema.http_options.model_dump(), proxy_location=schema.proxy_location)
        client.deploy_apps(schema, _blocking=False)
        url = f"http://{schema.http_options.host}:{schema.http_options.port}"
        _wait_until_ready([app.name for app in schema.applications], url)
        yield url
    finally:
        try:
            _shut_down([app.name for app in schema.applications])
        finally:  # even if Ray does not answer any more
            front.close()
            stop_embedded(settings)


def _check_free(host: str, port: int) -> None:
    """Raises `ServiceFailed` for a taken port, where Serve would wait until its timeout. A killed service frees its port soon."""
    deadline = time.monotonic() + PORT_TIMEOUT_S
    while True:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host, port))
                return
            except OSError as exc:
                if time.monotonic() > deadline:
                    raise ServiceFailed(f"{host}:{port} cannot be listened on: {exc.strerror}. Give another --port.") from exc
        time.sleep(0.2)


def _wait_until_ready(names: list[str], url: str) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        applications = serve.status().applications
        for name in names:
            application = applications.get(name)
            if application and application.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
                raise ServiceFailed(f"{name}: {application.message}")
        up = [name in applications and applications[name].status == ApplicationStatus.RUNNING for name in names]
        if all(up) and _answers(url):
            return
        time.sleep(0.2)
    raise ServiceFailed(f"not ready after {READY_TIMEOUT_S:.0f} s")


def _exit(*_: object) -> NoReturn:
    """Unwinds the `with` blocks, as Ctrl-C does."""
    raise SystemExit(0)


def _shut_down(names: list[str]) -> None:
    """Ends the applications first, so that dispatchers give their jobs back, then Ray with the rest of Serve."""
    if ray.is_initialized():
        with suppress(RayServeException):  # Serve had not started
            for name in names:
                serve.delete(name)
        ray.shutdown()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2.0).is_success
    except httpx.HTTPError:
        return False
