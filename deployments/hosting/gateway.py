"""The ingress under uvicorn, beside the cluster: it accepts and answers while Ray is down or being upgraded."""

import gc
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from deployments.hosting.embedded_postgres import database_url, keep_running
from deployments.hosting.telemetry import begin_telemetry
from deployments.hosting.tls import TlsFiles
from deployments.ingress.app import create_app
from deployments.settings import CONFIG_VARIABLE, configured_settings, load_settings

COLLECT_S = 600.0
"""How often a worker looks for garbage that refers to itself, in seconds."""
KEEP_ALIVE_S = 75
"""How long an idle connection stays open: longer than callers and proxies keep theirs (httpx 5 s, nginx 60 s). If the server
were the first, a request could meet the end of its connection and be lost."""
GRACE_S = 5
"""How long open status streams may hold a worker that was told to stop."""


def run(config: Path, host: str, port: int, workers: int, tls: Path | None = None) -> None:
    """Serves until interrupted. Workers are separate processes, which find `config` in the environment. Raises `Exposed`.

    tls: a folder that `write_certificate` wrote; with it the gateway speaks https. Raises `CertificateMissing`.
    """
    certificate = None if tls is None else TlsFiles.existing(tls)
    settings = load_settings(config)
    settings.refuse_exposure(host)
    threading.Thread(target=keep_running, args=(settings,), daemon=True).start()
    os.environ[CONFIG_VARIABLE] = str(config.absolute())
    uvicorn.run(
        "deployments.hosting.gateway:app",
        factory=True,
        host=host,
        port=port,
        workers=workers,
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
        ssl_certfile=certificate.chain if certificate else None,
        ssl_keyfile=certificate.key if certificate else None,
    )


def app() -> FastAPI:
    """What every worker hosts."""
    settings = configured_settings()
    begin_telemetry(settings.telemetry, "gateway", in_ray=False)
    threading.Thread(target=_collect_rarely, daemon=True).start()
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()
    return create_app(settings, database_url(settings))


def _collect_rarely() -> None:
    """Python's own full collections come as the process grows, and each stops it for as long as it takes to look at every object:
    for a second with 10,000 streams open (2 cores, measured), whose events then come late. Nearly all garbage is freed without.
    """
    gc.freeze()  # what is there from the start stays
    gc.set_threshold(10_000, 10, 1_000_000)
    while True:
        time.sleep(COLLECT_S)
        gc.collect()


def _end_after(parent: BaseProcess) -> None:
    """Ends this worker with its parent. If the parent was killed, its workers would keep the port from the next gateway."""
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
