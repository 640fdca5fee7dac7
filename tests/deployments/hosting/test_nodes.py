"""A node that joins after the build. Ray's list of nodes is a stand-in here."""

import asyncio
import logging
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from deployments.app import _nodes
from deployments.hosting import nodes
from deployments.hosting.nodes import NodeWatch
from deployments.ingress.app import create_app
from deployments.jobs.store import JobStore
from deployments.settings import Settings
from tests.patience import PATIENCE_S


async def test_a_node_that_joins_a_service_with_local_files_makes_it_unhealthy_and_is_logged(
    store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    cluster = [{"Alive": True}, {"Alive": False}]
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.nodes", lambda: cluster)
    monkeypatch.setattr(nodes, "CHECK_S", 0.02)
    settings = Settings(home=tmp_path, database="postgresql://db/reelray")
    app = create_app(settings, store, NodeWatch(settings, _nodes).check)
    transport = httpx.ASGITransport(app=app)
    watching = asyncio.create_task(NodeWatch(settings, _nodes).watch())
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        assert (await client.get("/health")).status_code == 200
        assert not caplog.records
        cluster.append({"Alive": True})
        unfit = await _answer(client, 503)
        async with asyncio.timeout(PATIENCE_S):
            while not caplog.records:  # noqa: ASYNC110  (nothing tells of it)
                await asyncio.sleep(0.01)
        assert unfit.json()["detail"].startswith("This Ray cluster has 2 nodes, and each would keep its own files in ")
        told = {(record.levelno, record.getMessage()) for record in caplog.records}
        assert told == {(logging.CRITICAL, unfit.json()["detail"])}
        cluster.pop()
        await _answer(client, 200)
    assert not watching.done()
    watching.cancel()
    with suppress(asyncio.CancelledError):
        await watching


async def _answer(client: httpx.AsyncClient, code: int) -> httpx.Response:
    """The first answer with this code."""
    async with asyncio.timeout(PATIENCE_S):
        while (answer := await client.get("/health")).status_code != code:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return answer


def test_shared_files_let_nodes_join():
    NodeWatch(Settings(database="postgresql://db/reelray", files="s3://bucket/files"), lambda: 3).check()
