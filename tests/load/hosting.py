"""The servers that benchmarks ask, each in a fresh process, whose peak of memory begins anew."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import yaml

from deployments.settings import CONFIG_VARIABLE
from tests.e2e.service import REELRAY, free_port, wait_until_healthy


@contextmanager
def hosted(what: str, config: dict[str, Any], **environment: str) -> Iterator[tuple[int, psutil.Process]]:
    """A server's port and process, from its first answer at /health on.

    what: a subcommand of `reelray`, or an app factory for uvicorn, as in "tests.load.constant:app". config: the YAML's content.
    """
    with TemporaryDirectory(prefix="reelray-") as folder:
        path, log, port = Path(folder) / "serve_config.yaml", Path(folder) / "log", free_port()
        path.write_text(yaml.safe_dump(config))
        if ":" in what:
            command = [sys.executable, "-m", "uvicorn", "--factory", what, "--log-level", "warning", "--no-access-log"]
        else:
            command = [str(REELRAY), what, "--config", str(path)]
        variables = os.environ | {CONFIG_VARIABLE: str(path), "PYTHONPATH": os.getcwd()} | environment
        with log.open("wb") as output:
            process = subprocess.Popen([*command, "--port", str(port)], env=variables, stdout=output, stderr=output)
        try:
            wait_until_healthy(f"http://127.0.0.1:{port}", process, log)
            yield port, psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def with_arguments(**arguments: Any) -> dict[str, Any]:
    """A configuration whose application has these arguments."""
    return {"applications": [{"args": arguments}]}
