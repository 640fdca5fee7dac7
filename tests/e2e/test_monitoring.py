"""What an operator's tools get from the running service."""

import json
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest

from deployments import metrics
from deployments.cli.client import QueueClient
from deployments.hosting.demo_weights import demo_inputs
from tests.e2e.collector import Collector
from tests.e2e.service import Service
from tests.patience import PATIENCE_S

ENDPOINT = "fal-ai/animatediff-sparsectrl-lcm"
TRACE = "0af7651916cd43dd8448eb211c80319c"
OF_EVERY_JOB = (
    metrics.SUBMITTED,
    metrics.WAIT,
    metrics.STAGE_WAIT,
    metrics.STAGE,
    metrics.ATTEMPTS,
    metrics.JOB_GPU,
    metrics.QUEUED,
    metrics.OLDEST,
    metrics.DATABASE,
    metrics.WEBHOOKS,
    metrics.UNIT,
    metrics.UNIT_WAIT,
    metrics.BACKLOG,
    metrics.TARGET,
    metrics.REPLICAS,
    metrics.READY,
    metrics.SCALING_AGE,
)
SPANS = {
    "submit": ("ingress", None),
    "wait in the queue": ("dispatcher", "submit"),
    "attempt": ("dispatcher", "submit"),
    "preprocess": ("dispatcher", "attempt"),
    "denoise": ("dispatcher", "attempt"),
    "sample": ("sampler", "denoise"),
    "units": ("sampler", "sample"),
    "decode": ("dispatcher", "attempt"),
    "webhook": ("dispatcher", "submit"),
}
"""Name -> the process that makes it, and the span above it."""
RAYS = (
    "ray_serve_deployment_replica_healthy",
    "ray_serve_replica_initialization_latency_ms_bucket",
    "ray_component_rss_bytes",
    "ray_node_mem_used",
    "ray_node_mem_total",
    "ray_node_disk_free",
    "ray_node_disk_usage",
)
"""Those of Ray's own that the dashboard and the alerts use and a machine without a GPU has."""


@pytest.fixture
def client(service: Service) -> Iterator[QueueClient]:
    with QueueClient(service.url) as client:
        yield client


def test_a_jobs_spans_and_metrics_reach_the_operators_tools(service: Service, client: QueueClient, collector: Collector):
    headers, query = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}, {"fal_webhook": collector.hook_url}
    job_input = demo_inputs()[ENDPOINT] | {"prompt": "a red ball"}
    path = f"{service.url}/queue/{ENDPOINT}"
    submitted = httpx.post(path, json=job_input, headers=headers, params=query, timeout=PATIENCE_S)
    assert submitted.headers["x-reelray-trace-id"] == TRACE
    *_, last = client.follow(ENDPOINT, submitted.json()["request_id"])
    receipt = last["metrics"]["receipt"]
    assert receipt["weights"]["base"].keys() == {"fingerprint"}, json.dumps(receipt)
    assert (receipt["units"], receipt["replicas"], receipt["gpu_seconds"]) == (1, 1, {}), "on a CPU"
    assert 0 < receipt["replica_seconds"] <= receipt["seconds"]["denoise"]
    assert (receipt["engine"], receipt["options"]["dtype"], receipt["options"]["device"]) == ("eager", "float32", "cpu")
    assert receipt["seconds"].keys() == {"preprocess", "denoise", "decode"}
    wanted = {name for metric in OF_EVERY_JOB for name in metric.exported_as} | set(RAYS)
    deadline = time.monotonic() + 60
    while missing := wanted - names_in(scrape(service)):
        assert time.monotonic() < deadline, missing
        time.sleep(1)
    while missing := SPANS.keys() - {span.name for span in collector.traces.get(TRACE, ())}:
        assert time.monotonic() < deadline, missing
        time.sleep(0.2)
    spans = {span.name: span for span in collector.traces[TRACE]}
    ids = {span.span_id: span.name for span in collector.traces[TRACE]}
    assert {name: (span.service, ids.get(span.parent)) for name, span in spans.items()} == SPANS
    assert (spans["units"].attributes["units"], spans["sample"].attributes["units"]) == (1, 1)
    assert collector.hooks == [f"00-{TRACE}-{spans['webhook'].span_id}-01"]


def scrape(service: Service) -> str:
    """What Prometheus would read from the node's agent, which listens on several ports."""
    (agent,) = service.processes("ray::DashboardAgent")
    for listening in agent.net_connections(kind="tcp"):
        if listening.status == psutil.CONN_LISTEN:
            try:
                text = httpx.get(f"http://127.0.0.1:{listening.laddr.port}/metrics", timeout=5).text
            except httpx.HTTPError:
                continue
            if "ray_node_mem_used" in text:
                return text
    return ""


def names_in(text: str) -> set[str]:
    return {line.split("{")[0].split(" ")[0] for line in text.splitlines() if line and not line.startswith("#")}
