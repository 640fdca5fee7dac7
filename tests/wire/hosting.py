"""The ingress as operators host it, in processes of its own: `reelray gateway` with two workers, and Serve behind HAProxy."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from deployments.hosting.tls import TlsFiles
from deployments.settings import Settings
from tests.e2e.service import ENVIRONMENT, REELRAY, free_port, wait_until_healthy

STOP_S = 30.0


@dataclass(frozen=True)
class Hosted:
    """A service that answers at `url`; nothing in it works on jobs."""

    url: str
    settings: Settings


@contextmanager
def hosted(kind: str, database: str, tls: TlsFiles | None = None) -> Iterator[Hosted]:
    """kind: "gateway" or "serve". database: the URL of a migrated one. tls: it then speaks https only, with these."""
    with TemporaryDirectory(prefix="reelray-") as folder:
        settings = Settings(home=Path(folder), database=database)
        port, config, log = free_port(), Path(folder) / "serve_config.yaml", Path(folder) / "log"
        application = {
            "name": "reelray",
            "route_prefix": "/",
            "import_path": "tests.load.constant:build",
            "logging_config": {"enable_access_log": False},
            "args": {"home": folder, "database": database},
            "deployments": [{"name": "ingress", "max_ongoing_requests": 5000, "ray_actor_options": {"num_cpus": 0.1}}],
        }
        listening = {"host": "127.0.0.1", "port": port, "keep_alive_timeout_s": 75}
        if kind == "serve" and tls:
            listening |= {"ssl_certfile": str(tls.chain), "ssl_keyfile": str(tls.key)}
        document = {"proxy_location": "HeadOnly", "http_options": listening, "applications": [application]}
        config.write_text(yaml.safe_dump(document))
        words = [str(REELRAY), kind, "--config", str(config), "--port", str(port)]
        if kind == "gateway":
            words += ["--workers", "2", *(["--tls", str(tls.key.parent)] if tls else [])]
        environment = os.environ | ENVIRONMENT | {"PYTHONPATH": os.getcwd(), "PYTHONWARNINGS": "ignore"}
        with log.open("wb") as output:
            process = subprocess.Popen(
                words,
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            url = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
            wait_until_healthy(url, process, log)
            yield Hosted(url, settings)
            process.send_signal(signal.SIGTERM)
            process.wait(STOP_S)
        finally:
            with suppress(ProcessLookupError):  # nothing is left, as it should be
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(STOP_S)
