"""`batch_job.yaml` against the schemas of KubeRay and Kubernetes, and against the command that it runs."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.cluster.test_kubernetes import SCHEMA, VERSION

JOB, PRIORITY = yaml.safe_load_all(Path("cluster/batch_job.yaml").read_text())
JOB_SCHEMA = {"$ref": "#/$defs/RayJob", "$defs": SCHEMA["$defs"]}


def test_the_ray_job_is_as_kuberay_and_kubernetes_define_it():
    jsonschema.validate(JOB, JOB_SCHEMA)
    kubernetes_validate.validate(PRIORITY, VERSION, strict=True)
    cluster = JOB["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": group["template"]}
        kubernetes_validate.validate(pod, VERSION, strict=True)
    assert cluster["workerGroupSpecs"][0]["template"]["spec"]["priorityClassName"] == PRIORITY["metadata"]["name"]


@pytest.mark.parametrize(
    ("field", "value"), [("entryPoint", "x"), ("backoffLimit", "3"), ("submissionMode", "Http"), ("suspend", 1)]
)
def test_the_schema_finds_what_kuberay_would_refuse(field: str, value: Any):
    broken = json.loads(json.dumps(JOB))
    broken["spec"][field] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, JOB_SCHEMA)


def test_it_runs_a_module_that_there_is():
    python, option, module, folder = JOB["spec"]["entrypoint"].split()
    assert (python, option) == ("python", "-m")
    assert Path(*module.split("."), "__main__.py").is_file()
    assert folder.startswith("s3://")
