import socket
from pathlib import Path

import pytest

from deployments.hosting.local_cluster import ServiceFailed, running
from deployments.settings import Exposed


def test_an_open_service_is_not_started_on_the_network():
    with pytest.raises(Exposed), running(Path("serve_config.yaml"), host="0.0.0.0"):
        pass


def test_a_taken_port_is_told_at_once():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(ServiceFailed, match=f"127.0.0.1:{port} cannot be listened on"),
            running(Path("serve_config.yaml"), port=port),
        ):
            pass
