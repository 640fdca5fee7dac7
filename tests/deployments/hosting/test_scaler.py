"""The policy as Serve makes it from the YAML: cloudpickled by value, loaded in the controller, and made with its arguments."""

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray import cloudpickle
from ray.serve._private.autoscaling_state import _resolve_policy_callable
from ray.serve.config import AutoscalingPolicy
from ray.serve.schema import ServeApplicationSchema

from deployments.jobs.job import NewJob
from deployments.jobs.store import JobStore
from tests.deployments.dispatch.test_autoscaling import Cluster


def in_controller(config: dict[str, Any]) -> Any:
    """What Serve's controller calls; it gets the class as bytes from the process that builds the application."""
    built = AutoscalingPolicy(**config)
    return _resolve_policy_callable(AutoscalingPolicy(_serialized_policy_def=built.get_serialized_policy_def(), **config))


def configured(**changed: Any) -> dict[str, Any]:
    """The policy of `serve_config.yaml`, with other settings."""
    application = yaml.safe_load(Path("serve_config.yaml").read_text())["applications"][0]
    application["args"] |= changed
    policy: dict[str, Any] = ServeApplicationSchema.model_validate(application).model_dump()["autoscaling_policy"]
    assert policy["policy_kwargs"]["settings"] == application["args"]  # an alias in the YAML
    return policy


async def test_the_yamls_policy_reads_the_services_own_database(database: str, store: JobStore):
    await store.submit(NewJob("fal-ai/controlnext", {}, units=(24.0, 650.0, 24.0), parallel=26))
    policy = in_controller(configured(database=database, scaling={"controlnext": {"denoise": {"min": 0, "max": 8}}}))
    cluster = Cluster()
    contexts = cluster.contexts()
    for context in contexts.values():
        context.deployment_name = context.deployment_name.replace("clips", "controlnext")
    targets: dict[Any, int] = {}
    deadline = time.monotonic() + 20
    while not targets and time.monotonic() < deadline:
        targets, _ = policy(contexts)
        time.sleep(0.05)  # noqa: ASYNC251  (as the controller's loop would be busy with others)
    # 650 units of 0.19 s in 30 s
    assert {key.name: target for key, target in targets.items()} == {
        "clips-preprocess": 1,
        "clips-denoise": 10,
        "clips-decode": 1,
    }


@pytest.mark.parametrize("wrong", [{"database": "postgresql://127.0.0.1:1/x"}, {"database": 7}, {"scaling": "much"}])
def test_settings_or_a_database_that_cannot_be_used_change_nothing(wrong: dict[str, Any]):
    policy = in_controller(configured(**wrong))
    cluster = Cluster()
    for _ in range(5):
        assert policy(cluster.contexts()) == ({}, None)
        time.sleep(0.02)
    cloudpickle.dumps(type(policy))
