"""`rayservice.yaml` against Kubernetes' own schemas and what we know of KubeRay's, and against the rest of the repository.

`kuberay.schema.json` says in its `$comment` what it is and what it is not.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray import __version__ as ray_version

from deployments.schemas.endpoint import ENDPOINTS
from deployments.settings import load_settings

SCHEMA = json.loads(Path("tests/cluster/kuberay.schema.json").read_text())
VERSION = kubernetes_validate.latest_version()


@cache
def documents() -> dict[tuple[str, str], Any]:
    """(kind, name) -> document."""
    found = yaml.safe_load_all(Path("cluster/rayservice.yaml").read_text())
    return {(each["kind"], each["metadata"]["name"]): each for each in found}


def cluster() -> Any:
    return documents()["RayService", "reelray"]["spec"]["rayClusterConfig"]


def templates() -> dict[str, Any]:
    """Group -> its pods' template."""
    groups = {group["groupName"]: group["template"] for group in cluster()["workerGroupSpecs"]}
    return {"head": cluster()["headGroupSpec"]["template"]} | groups


def containers() -> dict[str, Any]:
    return {group: template["spec"]["containers"][0] for group, template in templates().items()}


def test_the_ray_service_is_as_kuberays_types_have_it():
    jsonschema.validate(documents()["RayService", "reelray"], SCHEMA)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "serveConfigV3"), ""),
        (("spec", "serveConfigV2"), {}),
        (("spec", "upgradeStrategy", "type"), "Rolling"),
        (("spec", "upgradeStrategy", "clusterUpgradeOptions"), {"stepSizePercent": 10}),
        (("spec", "rayClusterConfig", "authOptions", "mode"), "password"),
        (("spec", "rayClusterConfig", "gcsFaultToleranceOptions"), {}),
        (("spec", "rayClusterConfig", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "rayClusterConfig", "workerGroupSpecs", 0, "minReplicas"), "1"),
    ],
)
def test_the_schema_finds_mistakes(path: tuple[Any, ...], value: Any):
    broken = json.loads(json.dumps(documents()["RayService", "reelray"]))
    place = broken
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, SCHEMA)


def test_pods_budgets_and_the_network_policy_are_as_kubernetes_defines_them():
    for (kind, name), document in documents().items():
        if kind != "RayService":
            kubernetes_validate.validate(document, VERSION, strict=True)
            assert document["metadata"]["namespace"] == "reelray", name
    for template in templates().values():
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
        kubernetes_validate.validate(pod, VERSION, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod | {"template": {"spec": {"container": []}}}, VERSION, strict=True)


def test_it_serves_the_configuration_for_several_nodes():
    embedded = yaml.safe_load(documents()["RayService", "reelray"]["spec"]["serveConfigV2"])
    assert embedded == yaml.safe_load(Path("cluster/serve_config.nodes.yaml").read_text())
    assert cluster()["rayVersion"] == ray_version


def test_every_group_offers_the_resource_that_its_replicas_ask_for():
    params = {group["groupName"]: group["rayStartParams"] for group in cluster()["workerGroupSpecs"]}
    offered = {group: json.loads(json.loads(each["resources"])) for group, each in params.items()}
    assert offered == {group: {group: 1000} for group in ("front", "preprocess", "denoise", "decode")}
    gpus = {group: container["resources"]["limits"].get("nvidia.com/gpu") for group, container in containers().items()}
    assert gpus == {"head": None, "front": None, "preprocess": "1", "denoise": "1", "decode": "1"}
    assert cluster()["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_groups_may_grow_to_what_the_configuration_may_ask_for():
    path = Path("cluster/serve_config.nodes.yaml")
    settings, (app,) = load_settings(path), yaml.safe_load(path.read_text())["applications"]
    share = {each["name"]: each["ray_actor_options"].get("num_gpus", 0) for each in app["deployments"]}
    most = {group["groupName"]: group["maxReplicas"] for group in cluster()["workerGroupSpecs"]}
    for endpoint in ENDPOINTS.values():
        for stage in ("preprocess", "denoise", "decode"):
            replicas = getattr(settings.scaling_of(endpoint), stage).max
            assert 1 < replicas * share[f"{endpoint.family}-{stage}"] <= most[stage]


def test_the_head_survives_its_loss_and_only_holders_of_the_token_reach_it():
    redis = cluster()["gcsFaultToleranceOptions"]
    assert redis["redisPassword"]["valueFrom"]["secretKeyRef"] == {"name": "reelray-redis", "key": "password"}
    assert cluster()["authOptions"] == {"mode": "token"}
    assert cluster()["headGroupSpec"].get("serviceType", "ClusterIP") == "ClusterIP"
    assert not cluster()["headGroupSpec"].get("enableIngress", False)
    policy = documents()["NetworkPolicy", "reelray"]["spec"]
    assert policy["podSelector"] == {"matchLabels": {"app": "reelray"}}
    others = [rule for rule in policy["ingress"] if "ports" in rule]
    inner = [rule for rule in policy["ingress"] if "ports" not in rule]
    assert [rule["from"] for rule in inner] == [[{"podSelector": {"matchLabels": {"app": "reelray"}}}]]
    to_dashboard = [rule["from"] for rule in others if {"port": 8265} in rule["ports"]]
    assert [source["podSelector"]["matchLabels"] for (source,) in to_dashboard] == [
        {"app.kubernetes.io/name": "kuberay-operator"}
    ]


def test_every_pod_is_probed_bounded_counted_in_a_budget_and_nobody_special():
    budgets = {name: each["spec"]["selector"]["matchLabels"] for (kind, name), each in documents().items() if "Budget" in kind}
    for group, template in templates().items():
        pod, container = template["spec"], containers()[group]
        assert template["metadata"]["labels"] == budgets[f"reelray-{group}"] == {"app": "reelray", "part": group}
        assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys()
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert (pod["securityContext"]["runAsNonRoot"], pod["securityContext"]["runAsUser"]) == (True, user_of_the_image())
        assert not container["securityContext"]["allowPrivilegeEscalation"]
        if group != "head":
            assert container["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": 8000}
            assert pod["terminationGracePeriodSeconds"] > longest_drain()


def test_no_secret_stands_in_a_file_and_every_pod_gets_them():
    for path in Path("cluster").iterdir():
        text = path.read_text()
        assert "PGPASSWORD:" not in text
        assert not any(word in text for word in ("AKIA", "-----BEGIN", "postgresql://postgres:"))
    for container in containers().values():
        named = [source["secretRef"]["name"] for source in container["envFrom"]]
        assert named == ["reelray-database", "reelray-s3", "reelray-hub"]


def user_of_the_image() -> int:
    (line,) = [line for line in Path("cluster/Dockerfile").read_text().splitlines() if "useradd" in line]
    return int(line.split("--uid ")[1].split()[0])


def longest_drain() -> float:
    serve = yaml.safe_load(Path("cluster/serve_config.nodes.yaml").read_text())
    return max(each.get("graceful_shutdown_timeout_s", 20) for each in serve["applications"][0]["deployments"])
