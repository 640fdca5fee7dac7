import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from deployments.cli.client import QueueClient
from deployments.hosting.gateway import run
from deployments.settings import CONFIG_VARIABLE, Settings
from tests.e2e.service import REELRAY, free_port, wait_until_healthy
from tests.patience import PATIENCE_S

ENDPOINT = "fal-ai/animatediff-sparsectrl-lcm"


@contextmanager
def gateways(settings: Settings) -> Iterator[tuple[int, Callable[[], subprocess.Popen[bytes]]]]:
    """A port, and a function that starts a gateway with two workers on it. All its gateways are stopped afterwards."""
    started: list[subprocess.Popen[bytes]] = []
    config = settings.home / "serve_config.yaml"
    config.write_text(yaml.safe_dump({"applications": [{"args": {"home": str(settings.home)}}]}))
    port = free_port()
    command = [REELRAY, "gateway", "--config", config, "--port", str(port), "--workers", "2"]

    def start() -> subprocess.Popen[bytes]:
        env = {**os.environ, "PYTHONWARNINGS": "ignore"}
        started.append(subprocess.Popen(command, stderr=subprocess.DEVNULL, env=env, start_new_session=True))
        return started[-1]

    try:
        yield port, start
    finally:
        for gateway in started:
            with suppress(ProcessLookupError):
                os.killpg(gateway.pid, signal.SIGKILL)
            gateway.wait(PATIENCE_S)


def test_the_gateway_accepts_and_answers_while_nothing_else_runs(home: Settings):
    with gateways(home) as (port, start), QueueClient(f"http://127.0.0.1:{port}") as client:
        gateway = start()
        wait_until_healthy(f"http://127.0.0.1:{port}", gateway)
        ids = [client.submit(ENDPOINT, {"prompt": "a red ball"}) for _ in range(4)]
        assert sorted(client.status(ENDPOINT, request_id)["queue_position"] for request_id in ids) == [0, 1, 2, 3]
        assert client.cancel(ENDPOINT, ids[0]) == "CANCELLATION_REQUESTED"
        assert client.status(ENDPOINT, ids[0])["status"] == "COMPLETED"
        gateway.terminate()
        assert gateway.wait(PATIENCE_S) in (0, -15)


def test_a_gateway_that_was_killed_can_be_started_again(home: Settings):
    with gateways(home) as (port, start):
        killed = start()
        wait_until_healthy(f"http://127.0.0.1:{port}", killed)
        workers = psutil.Process(killed.pid).children()
        killed.kill()
        killed.wait()
        assert not psutil.wait_procs(workers, timeout=PATIENCE_S)[1]
        again = start()
        wait_until_healthy(f"http://127.0.0.1:{port}", again)
        assert again.poll() is None


def test_an_idle_connection_stays_open_longer_than_its_caller_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options: dict[str, Any] = {}
    monkeypatch.setattr("uvicorn.run", lambda app, **given: options.update(given))
    monkeypatch.setattr("deployments.hosting.gateway.keep_running", lambda settings: None)
    monkeypatch.setenv(CONFIG_VARIABLE, "")  # put back afterwards
    config = tmp_path / "serve_config.yaml"
    config.write_text(yaml.safe_dump({"applications": [{"args": {"home": str(tmp_path)}}]}))
    run(config, "127.0.0.1", 8000, 1)
    serve = yaml.safe_load(Path("serve_config.yaml").read_text())["http_options"]["keep_alive_timeout_s"]
    assert options["timeout_keep_alive"] == serve > 60
