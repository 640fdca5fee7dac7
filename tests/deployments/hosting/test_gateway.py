import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import httpx
import psutil
import yaml

from deployments.cli.client import QueueClient
from deployments.settings import Settings
from tests.e2e.service import REELRAY, free_port

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
            gateway.wait(15)


def test_the_gateway_accepts_and_answers_while_nothing_else_runs(home: Settings):
    with gateways(home) as (port, start), QueueClient(f"http://127.0.0.1:{port}") as client:
        gateway = start()
        wait_until_healthy(port)
        ids = [client.submit(ENDPOINT, {"prompt": "a red ball"}) for _ in range(4)]
        assert sorted(client.status(ENDPOINT, request_id)["queue_position"] for request_id in ids) == [0, 1, 2, 3]
        assert client.cancel(ENDPOINT, ids[0]) == "CANCELLATION_REQUESTED"
        assert client.status(ENDPOINT, ids[0])["status"] == "COMPLETED"
        gateway.terminate()
        assert gateway.wait(15) in (0, -15)


def test_a_gateway_that_was_killed_can_be_started_again(home: Settings):
    with gateways(home) as (port, start):
        killed = start()
        wait_until_healthy(port)
        workers = psutil.Process(killed.pid).children()
        killed.kill()
        killed.wait()
        assert not psutil.wait_procs(workers, timeout=15)[1]
        again = start()
        wait_until_healthy(port)
        assert again.poll() is None


def wait_until_healthy(port: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).is_success:
                return
        except httpx.HTTPError:
            assert time.monotonic() < deadline
        time.sleep(0.1)
