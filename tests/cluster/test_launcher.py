"""`ray_cluster.yaml` against the schema and the checks of Ray's own launcher."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli as ray_commands
from ray.serve.scripts import cli as serve_commands

from tests.test_readmes import code

PATH = Path("cluster/ray_cluster.yaml")
SCHEMA = json.loads(Path(ray.__file__).with_name("autoscaler").joinpath("ray-schema.json").read_text())


def launcher() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(PATH.read_text())
    return found


def test_ray_accepts_it():
    jsonschema.validate(launcher(), SCHEMA)
    validate_config(prepare_config(launcher()))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(launcher() | {"workers": 3}, SCHEMA)


def test_its_nodes_offer_what_the_configuration_asks_for():
    nodes = {name: node["resources"] for name, node in launcher()["available_node_types"].items()}
    (application,) = yaml.safe_load(Path("cluster/serve_config.nodes.yaml").read_text())["applications"]
    for deployment in application["deployments"]:
        options = deployment["ray_actor_options"]
        (group,) = options["resources"]
        assert nodes[group][group] == 1000
        assert options["num_cpus"] <= nodes[group]["CPU"]
        assert ("num_gpus" in options) == ("GPU" in nodes[group])
    assert nodes[launcher()["head_node_type"]] == {"CPU": 0}


def test_only_holders_of_the_token_reach_it_and_its_dashboard_is_on_loopback():
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        start = launcher()[commands][-1]
        assert "RAY_AUTH_MODE=token" in start
        assert "--metrics-export-port=8080" in start
    assert "--dashboard-host=127.0.0.1" in launcher()["head_start_ray_commands"][-1]
    assert any(path.endswith("/.ray/auth_token") for path in launcher()["file_mounts"])


def test_every_command_of_ray_in_the_manual_is_there_with_its_options():
    text = "\n".join(code(Path("cluster/README.md").read_text()))
    found = re.findall(r"(?:^|['; ])(?<!reelray )(?:[A-Z_]+=\w+ )*(ray|serve) ([a-z-]+)((?: [^\s';`]+)*)", text, re.MULTILINE)
    assert len(found) > 8
    groups = {"ray": ray_commands.commands, "serve": serve_commands.commands}
    for group, name, rest in found:
        assert name in groups[group], (group, name)
        options = {option for parameter in groups[group][name].params for option in parameter.opts}
        assert {word.partition("=")[0] for word in rest.split() if word.startswith("--")} <= options, (group, name)
