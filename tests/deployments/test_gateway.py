import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import yaml

from deployments.client import QueueClient
from tests.conftest import embedded
from tests.e2e.service import free_port

ENDPOINT = "fal-ai/animatediff-sparsectrl-lcm"


def test_the_gateway_accepts_and_answers_while_nothing_else_runs():
    with embedded() as settings:
        settings.home.mkdir(parents=True)
        config = settings.home / "serve_config.yaml"
        config.write_text(yaml.safe_dump({"applications": [{"args": {"home": str(settings.home)}}]}))
        port = free_port()
        command = [
            Path(sys.executable).with_name("reelray"),
            "gateway",
            "--config",
            config,
            "--port",
            str(port),
            "--workers",
            "2",
        ]
        gateway = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONWARNINGS": "ignore"})
        try:
            with QueueClient(f"http://127.0.0.1:{port}") as client:
                wait_until_healthy(port)
                ids = [client.submit(ENDPOINT, {"prompt": "a red ball"}) for _ in range(4)]
                assert sorted(client.status(ENDPOINT, request_id)["queue_position"] for request_id in ids) == [0, 1, 2, 3]
                assert client.cancel(ENDPOINT, ids[0]) == "CANCELLATION_REQUESTED"
                assert client.status(ENDPOINT, ids[0])["status"] == "COMPLETED"
        finally:
            gateway.terminate()
            assert gateway.wait(15) in (0, -15)


def wait_until_healthy(port: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).is_success:
                return
        except httpx.HTTPError:
            assert time.monotonic() < deadline
        time.sleep(0.1)
