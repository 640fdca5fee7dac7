import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from deployments.cli.client import QueueClient
from deployments.hosting import local_cluster
from deployments.hosting.local_cluster import ServiceFailed, address_of, running
from deployments.settings import Exposed, Settings
from tests.e2e.service import free_port
from tests.patience import PATIENCE_S


def test_an_open_service_is_not_started_on_the_network():
    with pytest.raises(Exposed), running(Path("serve_config.yaml"), host="0.0.0.0"):
        pass


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("::1", r"\[::1\]")])
def test_a_taken_port_is_told_at_once(host: str, shown: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(local_cluster, "PORT_TIMEOUT_S", 0.1)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as taken:
        taken.bind((host, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(ServiceFailed, match=f"{shown}:{port} cannot be listened on: Address already in use"),
            running(Path("serve_config.yaml"), host=host, port=port),
        ):
            pass


def test_an_ipv6_address_is_in_brackets_in_a_url():
    assert [address_of(host, 80) for host in ("::1", "::", "localhost")] == ["[::1]:80", "[::]:80", "localhost:80"]


@pytest.fixture
def signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and stays so
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.usefixtures("signals")
def test_a_service_that_is_ended_while_it_waits_leaves_nothing_even_if_serve_does_not_answer(
    number: int, home: Settings, monkeypatch: pytest.MonkeyPatch
):
    """Ray is a stand-in here; PostgreSQL is real."""
    document = yaml.safe_load(Path("serve_config.yaml").read_text())
    document["applications"][0]["args"]["home"] = str(home.home)
    config = home.home / "serve_config.yaml"
    config.write_text(yaml.safe_dump(document))
    ended: list[str] = []
    postgres = home.home / "postgres" / "data" / "postmaster.pid"

    class Client:
        def deploy_apps(self, *_: Any, **__: Any) -> None:
            assert postgres.exists()

    def away(*_: Any) -> None:
        ended.append("serve")
        raise TimeoutError

    monkeypatch.setattr("ray.init", lambda **_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.shutdown", lambda: ended.append("ray"))
    monkeypatch.setattr("ray.serve.delete", away)
    monkeypatch.setattr(local_cluster, "serve_start", lambda **_: Client())
    monkeypatch.setattr(local_cluster, "_wait_until_ready", lambda *_: os.kill(os.getpid(), number))
    children, variables = psutil.Process().children(), set(os.environ)
    with pytest.raises(SystemExit), running(config, port=0):
        pass
    assert ended == ["serve", "ray"]
    assert not postgres.exists()
    assert psutil.Process().children() == children
    assert set(os.environ) <= variables


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_of_a_service_that_is_ended_while_it_starts_nothing_stays(number: int, home: Settings):
    """Its processes are known by a variable that all of them inherit."""
    document = yaml.safe_load(Path("serve_config.yaml").read_text())
    document["applications"][0]["args"]["home"] = str(home.home)
    config, mark = home.home / "serve_config.yaml", {"REELRAY_TEST": home.home.name}
    config.write_text(yaml.safe_dump(document))
    postgres = home.home / "postgres" / "data" / "postmaster.pid"

    def left() -> list[psutil.Process]:
        return [each for each in psutil.process_iter() if each.pid != os.getpid() and mark.items() <= environment(each).items()]

    with (home.home / "serve.log").open("wb") as log:
        command = [Path(sys.executable).with_name("reelray"), "serve", "--config", config, "--port", str(free_port())]
        service = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | mark, start_new_session=True)
    deadline = time.monotonic() + PATIENCE_S
    while not postgres.exists():
        assert service.poll() is None, (home.home / "serve.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)  # Ray begins to start
    service.send_signal(number)
    service.wait(PATIENCE_S)
    deadline = time.monotonic() + PATIENCE_S
    while remaining := left():
        assert time.monotonic() < deadline, ([each.cmdline() for each in remaining], (home.home / "serve.log").read_text())
        time.sleep(0.2)
    assert not postgres.exists()


def environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:  # it has just ended
        return {}


class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(b'{"status": "COMPLETED"}')

    def log_message(self, *_: Any) -> None:
        pass


def test_a_proxy_of_the_shell_is_not_asked_for_this_machines_loopback(monkeypatch: pytest.MonkeyPatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_port}"
        try:
            assert local_cluster._answers(url)
            with QueueClient(url) as client:
                assert client.status("fal-ai/controlnext", "1")["status"] == "COMPLETED"
                assert client.download(f"{url}/files/x") == b'{"status": "COMPLETED"}'
        finally:
            server.shutdown()
