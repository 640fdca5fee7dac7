import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from deployments.hosting import haproxy, haproxy_launch
from deployments.hosting.haproxy import BINARY, FALLBACK_PORT, PORTS, SWITCH, fronted
from deployments.hosting.haproxy_launch import mended
from deployments.hosting.tls import write_certificate
from tests.patience import PATIENCE_S


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("RAY_SERVE_"):
            monkeypatch.delenv(name)


def test_the_environment_says_haproxy_for_as_long_as_the_block_lasts():
    before = dict(os.environ)
    with fronted():
        assert os.environ[SWITCH] == "1"
        assert len(os.environ["RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH"]) + 57 <= 97
        assert Path(os.environ["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent.stat().st_mode & 0o077 == 0
    assert dict(os.environ) == before


@pytest.mark.parametrize("chosen", ["0", ""])
def test_an_operator_may_switch_it_off(chosen: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(SWITCH, chosen)
    before = dict(os.environ)
    with fronted():
        assert dict(os.environ) == before


def test_what_an_operator_has_set_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(SWITCH, "1")
    monkeypatch.setenv("RAY_SERVE_HAPROXY_TUNE_BUFSIZE", "32768")
    monkeypatch.setenv(BINARY, "/usr/sbin/haproxy")
    with fronted():
        assert os.environ["RAY_SERVE_HAPROXY_TUNE_BUFSIZE"] == "32768"
        assert os.environ[BINARY] == "/usr/sbin/haproxy"
    assert os.environ["RAY_SERVE_HAPROXY_TUNE_BUFSIZE"] == "32768"


def test_without_the_wheel_serve_keeps_its_own_proxy_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(haproxy, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING), fronted():
        assert SWITCH not in os.environ
    assert [record.__dict__["action"] for record in caplog.records] == ["no_haproxy"]


def test_two_services_of_a_machine_share_no_port():
    with socket.socket() as first:
        first.bind(("127.0.0.1", 0))
        first.listen()
        with fronted():
            ports = [int(os.environ[name]) for name in (*PORTS, FALLBACK_PORT)]
        assert first.getsockname()[1] not in ports
    assert len(set(ports)) == 3
    assert 8500 not in ports


def test_two_services_that_start_at_once_share_no_port(monkeypatch: pytest.MonkeyPatch):
    """Neither listens yet when the other one looks."""
    names = (*PORTS, FALLBACK_PORT)
    with fronted():
        first = {os.environ[name] for name in names}
        for name in [name for name in os.environ if name.startswith("RAY_SERVE_")]:
            monkeypatch.delenv(name)
        with fronted():
            second = {os.environ[name] for name in names}
    assert len(first | second) == 6


def test_haproxy_ends_with_the_process_that_started_it(tmp_path: Path):
    """The starter is killed; a shell script that sleeps stands for HAProxy."""
    stand_in, config = tmp_path / "haproxy", tmp_path / "haproxy.cfg"
    stand_in.write_text("#!/bin/sh\necho $$\nexec sleep 3600\n")
    stand_in.chmod(0o700)
    config.write_text("defaults\n")
    code = "import subprocess, sys; subprocess.run(sys.argv[1:])"
    launch = [sys.executable, "-IS", haproxy_launch.__file__, "", stand_in, "-db", "-f", config]
    with subprocess.Popen([sys.executable, "-c", code, *launch], stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None
        process = psutil.Process(int(starter.stdout.readline()))
        starter.kill()
        process.wait(PATIENCE_S)


@pytest.mark.parametrize(
    ("host", "replica"), [("*", "127.0.0.1"), ("127.0.0.1", "127.0.0.1"), ("::1", "[::1]"), ("127.0.0.2", "127.0.0.2")]
)
def test_serves_configuration_is_mended_and_haproxy_takes_it(tmp_path: Path, host: str, replica: str):
    """The configuration lines are those that Ray Serve 2.60 writes. Its replicas listen where the service does."""
    config = tmp_path / "haproxy.cfg"
    config.write_text(
        "defaults\n    mode http\n    timeout connect 1s\n    timeout client 1s\n    timeout server 1s\n"
        "frontend prometheus\n    bind :9101\n"
        f"frontend http_frontend\n    bind {host}:8000\n    default_backend default_backend\n"
        "backend http-reelray\n    server near 127.0.0.1:30001 check\n    server far 10.0.0.7:30001 check\n"
        "    server SERVE_PROXY_ACTOR 127.0.0.1:8500 check backup\n"
        "backend default_backend\n    http-request return status 404 content-type text/plain string nope\n"
        "listen stats\n  bind *:8404\n  stats enable\n"
    )
    tls = write_certificate(tmp_path)
    pem = tmp_path / "both.pem"
    pem.write_bytes(tls.chain.read_bytes() + tls.key.read_bytes())
    config.write_text(mended(config.read_text(), str(pem)))
    lines = [line.strip() for line in config.read_text().splitlines()]
    assert [line for line in lines if line.startswith("bind")] == [
        "bind 127.0.0.1:9101",
        f"bind {host}:8000 ssl crt {pem} alpn http/1.1 ssl-max-ver TLSv1.2",
        "bind 127.0.0.1:8404",
    ]
    assert [line.split()[2] for line in lines if line.startswith("server")] == [
        f"{replica}:30001",
        "10.0.0.7:30001",
        f"{replica}:8500",
    ]
    assert "http-request set-header X-Forwarded-Proto https" in lines
    assert "404" not in " ".join(line for line in lines if "8404" not in line)
    with fronted():
        checked = subprocess.run([os.environ[BINARY], "-c", "-f", config], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
