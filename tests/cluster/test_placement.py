"""Where each stage runs, by the configurations of `cluster/`. tests/deployments/test_settings.py builds each application."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from ray.serve.schema import (
    DeploymentSchema,
    HTTPOptionsSchema,
    LoggingConfig,
    RayActorOptionsSchema,
    ServeApplicationSchema,
    ServeDeploySchema,
)

CONFIGS = ["serve_config.yaml", *sorted(map(str, Path("cluster").glob("serve_config.*.yaml")))]
STAGES = ("preprocess", "denoise", "decode")


def application(path: str) -> Any:
    (found,) = yaml.safe_load(Path(path).read_text())["applications"]
    return found


def actors(path: str) -> dict[str, Any]:
    """Deployment -> what a replica of it takes."""
    return {each["name"]: each["ray_actor_options"] for each in application(path)["deployments"]}


def gpus(path: str) -> dict[str, float]:
    """The same for the stages' GPUs."""
    return {name: options["num_gpus"] for name, options in actors(path).items() if name.endswith(STAGES)}


@pytest.mark.parametrize("path", CONFIGS)
def test_serve_knows_every_option(path: str):
    """Serve itself ignores those that it does not know."""
    document = yaml.safe_load(Path(path).read_text())
    app = application(path)
    given: list[tuple[type[BaseModel], Any]] = [
        (ServeDeploySchema, document),
        (HTTPOptionsSchema, document["http_options"]),
        (ServeApplicationSchema, app),
        (LoggingConfig, app["logging_config"]),
    ]
    for deployment in app["deployments"]:
        given += [(DeploymentSchema, deployment), (RayActorOptionsSchema, deployment["ray_actor_options"])]
    assert not [(model.__name__, key) for model, keys in given for key in keys if key not in model.model_fields]


@pytest.mark.parametrize("path", CONFIGS)
def test_every_configuration_scales_by_the_same_policy_and_drains_as_long(path: str):
    ours, root = application(path), application("serve_config.yaml")
    assert ours["autoscaling_policy"] == root["autoscaling_policy"] | {"policy_kwargs": {"settings": ours["args"]}}
    kept = ("max_ongoing_requests", "graceful_shutdown_timeout_s")
    expected = {each["name"]: [each.get(key) for key in kept] for each in root["deployments"]}
    assert {each["name"]: [each.get(key) for key in kept] for each in ours["deployments"]} == expected


def test_on_one_gpu_all_stages_fit_with_one_replica_each():
    path = "cluster/serve_config.gpu.yaml"
    assert len(gpus(path)) == 6
    assert 0.5 < sum(gpus(path).values()) <= 1
    assert "scaling" not in application(path)["args"], "the default is one replica"


def test_in_pools_denoisers_have_whole_gpus_and_the_other_stages_share_one():
    found = gpus("cluster/serve_config.pools.yaml")
    assert {share for name, share in found.items() if name.endswith("denoise")} == {1}
    assert sum(share for name, share in found.items() if not name.endswith("denoise")) <= 1


def test_on_several_nodes_every_replica_is_bound_to_the_group_of_its_stage():
    found = actors("cluster/serve_config.nodes.yaml")
    groups = {name: next((stage for stage in STAGES if name.endswith(stage)), "front") for name in found}
    assert {name: options["resources"] for name, options in found.items()} == {name: {group: 1} for name, group in groups.items()}
    assert all(("num_gpus" in options) == (groups[name] != "front") for name, options in found.items())


def test_all_configurations_for_gpus_serve_the_same_models():
    models = [{family: application(path)["args"][family] for family in ("animatediff", "controlnext")} for path in CONFIGS[1:]]
    assert all(each == models[0] for each in models)
