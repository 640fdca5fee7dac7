"""The policy as Serve makes it from the YAML: cloudpickled by value, loaded in the controller, and made with its arguments."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve._private.autoscaling_state import _resolve_policy_callable
from ray.serve.config import AutoscalingPolicy

from deployments.jobs.job import NewJob
from deployments.jobs.store import JobStore
from tests.deployments.dispatch.test_autoscaling import Cluster
from tests.deployments.dispatch.test_backlog import ended


def in_controller(config: dict[str, Any]) -> Any:
    """What Serve's controller calls; it gets the class as bytes from the process that builds the application."""
    built = AutoscalingPolicy(**config)
    return _resolve_policy_callable(AutoscalingPolicy(_serialized_policy_def=built.get_serialized_policy_def(), **config))


def configured(**changed: Any) -> dict[str, Any]:
    """The policy of `serve_config.yaml`, with other settings."""
    application = yaml.safe_load(Path("serve_config.yaml").read_text())["applications"][0]
    application["args"] |= changed
    policy: dict[str, Any] = application["autoscaling_policy"]
    assert policy["policy_kwargs"]["settings"] == application["args"]  # an alias in the YAML
    return policy


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("INTERVAL_S", 0.02), ("SHARE", 1.0), ("OUTAGE_PAUSE_S", 0.02)):
        monkeypatch.setattr(f"deployments.dispatch.backlog.{name}", value)
    monkeypatch.setattr("deployments.jobs.database.RIDE_OUT_S", 0.0)


async def test_the_yamls_policy_reads_the_services_own_database(database: str, store: JobStore):
    await store.submit(NewJob("fal-ai/controlnext", {}, units=(24.0, 650.0, 24.0), parallel=26))
    policy = in_controller(configured(database=database, scaling={"controlnext": {"denoise": {"min": 0, "max": 8}}}))
    contexts = Cluster().contexts()
    for context in contexts.values():
        context.deployment_name = context.deployment_name.replace("clips", "controlnext")
    targets: dict[Any, int] = {}
    async with asyncio.timeout(20):
        while not targets:
            targets, _ = policy(contexts)
            await asyncio.sleep(0.02)
    await ended(policy._reader)
    # 650 units of 0.19 s in 30 s
    assert {key.name: target for key, target in targets.items()} == {"clips-preprocess": 1, "clips-denoise": 5, "clips-decode": 1}


@pytest.mark.parametrize("wrong", [{"database": "postgresql://127.0.0.1:1/x"}, {"database": 7}, {"scaling": "much"}])
async def test_settings_or_a_database_that_cannot_be_used_change_nothing(wrong: dict[str, Any]):
    policy = in_controller(configured(**wrong))
    for _ in range(5):
        assert policy(Cluster().contexts()) == ({}, None)
        await asyncio.sleep(0.02)
    await ended(policy._reader)
