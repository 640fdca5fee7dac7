"""Deploys an application beside the service: `python -m tests.e2e.another_application GCS_ADDRESS`.

It prints the application's answer, and the service's replicas before and after.
"""

import json
import sys
from typing import Any

import ray
from ray import serve


class Another:
    def __call__(self) -> str:
        return "deployed"


def replicas() -> dict[str, dict[Any, int]]:
    """Deployment -> how many replicas it has in each state."""
    deployments = serve.status().applications["reelray"].deployments
    return {name: each.replica_states for name, each in deployments.items()}


if __name__ == "__main__":
    ray.init(address=sys.argv[1], namespace="serve", log_to_driver=False)
    before = replicas()
    deployment: Any = serve.deployment(Another, ray_actor_options={"num_cpus": 0}, graceful_shutdown_wait_loop_s=0.1)
    answer = serve.run(deployment.bind(), name="another", route_prefix=None).remote().result(timeout_s=60)
    sys.stdout.write(json.dumps([answer, before, replicas()]))
    serve.delete("another", _blocking=False)
