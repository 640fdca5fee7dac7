"""The whole service in processes of its own: what `reelray serve` starts, and what a power cut leaves of it."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from deployments.settings import Settings
from tests.patience import PATIENCE_S

READY_S = 300.0
"""A start takes half a minute of both cores, and minutes beside other work."""
MODELS = ("animatediff", "controlnext")
"""Families of the settings."""
REELRAY = Path(sys.executable).with_name("reelray")
ENVIRONMENT = {"RAY_worker_niceness": "0", "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.3"}
"""Ray runs its workers at niceness 15, so beside tests that compile they would get a thirtieth of a core. Serve's
controller looks at its replicas ten times a second, for which it takes 6% of a core.
"""


@dataclass
class Service:
    """`reelray serve` on demo weights. home: its database, files and weights, which outlive it.

    without: models that are left out, for each of which three processes need not load torch. added: blocks for the settings.
    root: the folder of the code that it runs.
    """

    home: Path
    queue: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    added: dict[str, Any] = field(default_factory=dict)
    root: Path = field(default_factory=Path.cwd)
    import_path: str = "deployments.app:build"
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    @property
    def settings(self) -> Settings:
        """Its own, for what a test computes beside it: with another number of threads the bits may differ."""
        return Settings.model_validate({"home": self.home, "queue": self.queue, **{model: {"threads": 1} for model in MODELS}})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Returns once it is all there. It answers before that: the door needs no models."""
        self.port = self.port or free_port()
        config = yaml.safe_load(Path("serve_config.yaml").read_text())
        (application,) = config["applications"]
        application["import_path"] = self.import_path
        application["args"] |= {"home": str(self.home), "fetch": {"allow_private": True}, "queue": self.queue} | self.added
        for model in set(MODELS).difference(self.without):
            application["args"][model]["threads"] = 1  # six processes share the cores
        for model in self.without:
            application["args"][model] = None
            application["deployments"] = [each for each in application["deployments"] if not each["name"].startswith(model)]
        path = self.home / "serve_config.yaml"
        path.write_text(yaml.safe_dump(config))
        command = [str(REELRAY), "serve", "--config", str(path), "--port", str(self.port)]
        log_path = self.home / "serve.log"
        with log_path.open("ab") as log:
            begin = log.tell()
            env = os.environ | ENVIRONMENT | {"PYTHONPATH": str(self.root)}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=self.root, start_new_session=True)
        deadline = time.monotonic() + READY_S
        while b"Reelray answers at" not in log_path.read_bytes()[begin:]:
            assert self.process.poll() is None, log_path.read_text()
            assert time.monotonic() < deadline, f"not ready after {READY_S} s"
            time.sleep(0.1)
        assert answers(self.url)

    @property
    def running(self) -> bool:
        """Whether its command runs."""
        return self.process is not None and self.process.poll() is None

    def processes(self, word: str) -> list[psutil.Process]:
        """Those of its processes with `word` in their command line."""
        assert self.process is not None
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if word in " ".join(child.cmdline())]

    def stop(self) -> int:
        """As an operator stops it. Returns the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)

    def kill(self) -> None:
        """SIGKILL to every process: the command, Ray's, Serve's and PostgreSQL's."""
        assert self.process is not None
        victims = {self.process.pid: psutil.Process(self.process.pid)}
        victims |= {child.pid: child for child in victims[self.process.pid].children(recursive=True)}
        postmaster = int((self.home / "postgres" / "data" / "postmaster.pid").read_text().split()[0])
        for process in (psutil.Process(postmaster), *psutil.Process(postmaster).children(recursive=True)):
            victims[process.pid] = process
        for victim in victims.values():
            with suppress(psutil.NoSuchProcess):  # some end by themselves when the one above them is gone
                victim.kill()
        psutil.wait_procs(victims.values(), timeout=PATIENCE_S)
        self.process.wait(PATIENCE_S)


@contextmanager
def gateway(service: Service) -> Iterator[str]:
    """The URL of a gateway with two workers beside `service`, which need not run."""
    port = free_port()
    config = service.home / "serve_config.yaml"
    command = [str(REELRAY), "gateway", "--config", str(config), "--port", str(port), "--workers", "2"]
    with (service.home / "gateway.log").open("ab") as log:
        env = os.environ | {"PYTHONPATH": str(service.root)}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=service.root, start_new_session=True)
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}", process, service.home / "gateway.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2, verify=False).is_success
    except httpx.HTTPError:
        return False


def wait_until_healthy(url: str, process: "subprocess.Popen[bytes]", log: Path | None = None) -> None:
    """Returns once a server answers. Raises `AssertionError` with its log if it ends, and after `PATIENCE_S`."""
    deadline = time.monotonic() + PATIENCE_S
    while not answers(url):
        assert process.poll() is None, log and log.read_text()
        assert time.monotonic() < deadline, log and log.read_text()
        time.sleep(0.1)


def free_port() -> int:
    """A free port below those that the system hands out, of which Ray takes dozens while the service starts."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise AssertionError("a hundred ports were taken")
