import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from deployments.jobs.store import JobStore
from deployments.jobs.work import StageStatus, Work
from tests.conftest import TEMPLATE, drop, execute, of_database
from tests.deployments.cli.test_main import config, run

CONTROLNEXT = "fal-ai/controlnext"
STAGES = [
    StageStatus(CONTROLNEXT, "decode", 0.1, 20.0, 1.5, 1, 1),
    StageStatus(CONTROLNEXT, "denoise", 0.2, 31.0, 42.4, 2, 3),
    StageStatus("fal-ai/animatediff-sparsectrl-lcm", "denoise", 0.2, 31.0, 0.0, 1, 1),
]


async def filled(url: str) -> None:
    store = await JobStore.open(url)
    await Work(store.database, []).save(STAGES)
    await store.database.fetch("UPDATE stages SET at = at - interval '2 minutes' WHERE stage = 'decode'")
    await store.close()


@pytest.fixture
def service(postgres: str, tmp_path: Path) -> Iterator[Path]:
    """The configuration of a service whose autoscaling has written what it knows."""
    name = f"stages_{uuid4().hex}"
    asyncio.run(execute(postgres, f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}"))
    url = of_database(postgres, name)
    asyncio.run(filled(url))
    yield config(tmp_path, database=url)
    asyncio.run(drop(postgres, name))


def test_a_queues_status_shows_each_stages_backlog_replicas_and_target(service: Path):
    told = run("queue", "status", "controlnext", "--config", service)
    assert told.stdout.splitlines() == [
        f"{CONTROLNEXT}: open, 0 waiting, 0 running",
        "  denoise: 42 s of backlog, 2 replicas, target 3",
        "  decode: 2 s of backlog, 1 replicas, target 1 (120 s ago; nothing is scaled since)",
    ]
    told = run("queue", "status", "controlnext", "--json", "--config", service)
    found = json.loads(told.stdout)
    stages = found.pop("stages")
    assert found == {"endpoint": CONTROLNEXT, "queued": 0, "delayed": 0, "running": 0, "paused_at": None}
    assert 0 <= stages[0].pop("age_s") < 60
    expected = {"stage": "denoise", "unit_s": 0.2, "ready_s": 31.0, "backlog_s": 42.4, "replicas": 2, "target": 3}
    assert stages[0] == {"endpoint": CONTROLNEXT, **expected}
