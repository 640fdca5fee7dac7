"""HAProxy before Serve, as `reelray serve` starts it."""

import time

import httpx
import psutil

from tests.e2e.service import Service
from tests.patience import PATIENCE_S


def test_haproxy_listens_nowhere_but_where_the_service_does(service: Service):
    fronts = service.processes("haproxy.cfg")  # more than one while the old one of a reload still has connections
    connections = [connection for front in fronts for connection in front.net_connections("tcp")]
    ports = {connection.laddr for connection in connections if connection.status == psutil.CONN_LISTEN}
    assert {address for address, _ in ports} == {"127.0.0.1"}
    assert service.port in {port for _, port in ports}


def test_a_killed_haproxy_is_started_again_and_tells_nobody_that_a_job_is_unknown(service: Service):
    for front in service.processes("haproxy.cfg"):
        front.kill()
        front.wait(PATIENCE_S)
    assert set(answers_until_up(service)) <= {"no connection", 503, 200}


def test_after_the_death_of_the_ingress_callers_wait_and_are_answered(service: Service):
    [ingress] = service.processes("ServeReplica:reelray:ingress")
    ingress.kill()
    ingress.wait(PATIENCE_S)
    assert answers_until_up(service) == [200]


def answers_until_up(service: Service) -> list[str | int]:
    deadline = time.monotonic() + PATIENCE_S
    seen: list[str | int] = []
    while seen[-1:] != [200]:
        assert time.monotonic() < deadline, seen[-1]
        try:
            seen.append(httpx.get(f"{service.url}/health", timeout=PATIENCE_S).status_code)
        except httpx.TransportError:
            seen.append("no connection")
        time.sleep(0.05)
    return seen
