"""Kills replicas, samplers, dispatchers and whole nodes of a Ray cluster while jobs run: is anything lost, or done twice?

    python -m tests.chaos.nodes [--jobs 300] [--seed 1] [--over-s 150] [--save]

Three Ray nodes on this machine, of Ray's own cluster utility, with the service as it is deployed on several nodes: Serve, the
database by its URL, and files on an S3 server. Jobs are the tests' third endpoint with steps of several units that sleep, and a
file counts the units. Serve's controller and proxy stay alive, and so does the ingress: what makes their loss harmless (Redis,
several ingresses) is not part of this.
"""

import argparse
import asyncio
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import asyncpg
import httpx
import psutil
import pytest
import ray
import yaml
from ray import serve
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.cluster_utils import Cluster
from ray.serve._private.api import serve_start
from ray.serve.schema import ServeDeploySchema

from deployments.hosting.embedded_postgres import database_url
from deployments.hosting.local_cluster import _wait_until_ready
from deployments.settings import Settings
from tests.bucket import bucket, s3_server
from tests.chaos.findings import Findings
from tests.conftest import embedded
from tests.e2e.service import ENVIRONMENT, free_port
from tests.e2e.third.added import ENDPOINT, with_third_endpoint
from tests.load.report import Report, table

STEPS, UNITS, UNIT_S = 4, 6, 0.02
CLIPS = 10
"""Different clips: jobs whose seeds differ by a multiple of it have one."""
WORKERS = 2
"""Nodes beside the head."""
DENOISERS = 3
MOST_WORK = 1.1
"""Units that are run, in units that are needed. On a busy machine one may straggle and is run twice."""
DECK = (
    *["kill a denoise replica"] * 4,
    *["kill a sampler"] * 2,
    "kill a dispatcher",
    "kill a decoder",
    "kill a node",
    "drain a node",
)
PROCESSES = {"denoise replica": "solid-denoise", "sampler": ":sampler", "dispatcher": ":dispatcher", "decoder": "solid-decode"}
"""What a blow names -> a word of the command line."""
NODE: dict[str, Any] = {"num_cpus": 8, "include_dashboard": False}
PREEMPTION = 2
"""Ray's `DrainNodeReason` that a node cannot refuse."""
DRAIN_S = 20.0
CALM_S = 20.0
"""How long blows go on after the last job was submitted."""


@dataclass(frozen=True)
class Plan:
    """over_s: how long submissions take. pause_s: between blows, shortest and longest."""

    jobs: int
    seed: int
    over_s: float
    pause_s: tuple[float, float] = (3.0, 9.0)
    patience_s: float = 300.0
    deck: tuple[str, ...] = DECK


@dataclass
class Nodes:
    """The cluster and the service in it."""

    plan: Plan
    settings: Settings
    cluster: Cluster
    port: int
    random: random.Random
    blows: Counter[str] = field(default_factory=Counter)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def rage(self) -> None:
        """Deals blows until cancelled."""
        while True:
            for name in self.random.sample(self.plan.deck, len(self.plan.deck)):
                await asyncio.sleep(self.random.uniform(*self.plan.pause_s))
                verb, _, target = name.partition(" a ")
                if target == "node":
                    await self._lose_node(verb == "drain")
                elif victims := _processes(PROCESSES[target]):
                    with suppress(psutil.NoSuchProcess):
                        self.random.choice(victims).kill()
                else:
                    continue
                self.blows[name] += 1

    async def _lose_node(self, drained: bool) -> None:
        """Another one comes in its place. drained: Ray is told before, and Serve moves its replicas.

        Not in a thread: Ray sets signal handlers where it starts a node.
        """
        node = self.random.choice(list(self.cluster.worker_nodes))
        if drained:
            deadline_ms = int((time.time() + DRAIN_S) * 1000)
            client = GcsClient(address=self.cluster.address)
            client.drain_node(node.node_id, PREEMPTION, "the tests", deadline_ms)
            self._add_node()
            await asyncio.sleep(DRAIN_S)
        for process in psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.cluster.remove_node(node, allow_graceful=False)
        if not drained:
            self._add_node()

    def _add_node(self) -> None:
        for left in reversed(range(3)):
            try:
                self.cluster.add_node(**NODE, wait=False)
                return
            except Exception:  # Ray has no class for it: on a busy machine a node may not start within its 30 s
                if not left:
                    raise


def _processes(word: str) -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if word in " ".join(process.cmdline()):
                found.append(process)
    return found


def _end_nodes() -> None:
    for process in _processes("raylet"):
        with suppress(psutil.NoSuchProcess):
            process.kill()


@contextmanager
def serving(plan: Plan) -> Iterator[Nodes]:
    """The service on three nodes, ready."""
    with ExitStack() as stack:
        patched = stack.enter_context(pytest.MonkeyPatch.context())
        settings = stack.enter_context(embedded())
        code = with_counted_endpoint(Path(stack.enter_context(TemporaryDirectory(prefix="reelray-code-"))))
        for name, value in (ENVIRONMENT | {"PYTHONPATH": str(code)}).items():
            patched.setenv(name, value)
        ours = {"", str(Path.cwd())}  # they search where we do, too, before PYTHONPATH
        patched.setattr(sys, "path", [str(code), *(path for path in sys.path if path not in ours)])
        url = database_url(settings)
        files = stack.enter_context(bucket(stack.enter_context(s3_server()), patched))
        settings = settings.model_copy(update={"database": url, "files": files})
        schema = _schema(settings)
        patched.chdir(code)  # Ray's workers begin in our folder, and find its code first
        stack.callback(_end_nodes)  # those that did not start in time
        cluster = Cluster(initialize_head=True, head_node_args=NODE | {"resources": {"front": 10}})
        stack.callback(cluster.shutdown)
        nodes = Nodes(plan, settings, cluster, schema.http_options.port, random.Random(plan.seed))
        for _ in range(WORKERS):
            nodes._add_node()
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, namespace="serve", log_to_driver=False)
        stack.callback(ray.shutdown)
        client = serve_start(http_options=schema.http_options.model_dump(), proxy_location=schema.proxy_location)
        stack.callback(serve.shutdown)
        client.deploy_apps(schema, _blocking=False)
        _wait_until_ready(client, ["reelray"], nodes.url)
        yield nodes


def with_counted_endpoint(root: Path) -> Path:
    """A copy of the code with the third endpoint, whose jobs are counted."""
    with_third_endpoint(root)
    for path in (Path(__file__).parent / "counted").glob("[!_]*.py"):
        (root / "engines" / "solid" / path.name).write_text(path.read_text())
    return root


def _schema(settings: Settings) -> ServeDeploySchema:
    """`serve_config.yaml` with this endpoint alone, and several replicas of what is killed."""
    document = yaml.safe_load(Path("serve_config.yaml").read_text())
    document["http_options"]["port"] = free_port()
    (application,) = document["applications"]
    scaling = {"preprocess": _count(2), "denoise": _count(DENOISERS), "decode": _count(2)}
    application["args"] = {
        "home": str(settings.home),
        "database": settings.database,
        "files": settings.files,
        "queue": {"lease_s": 4, "checkpoint_s": 0.05},
        "animatediff": None,
        "controlnext": None,
        "solid": {"steps": STEPS, "units": UNITS, "unit_s": UNIT_S, "clips": CLIPS, "record": str(settings.home / "units")},
        "scaling": {"solid": scaling},
    }
    application["autoscaling_policy"]["policy_kwargs"]["settings"] = application["args"]
    kept = [each for each in application["deployments"] if each["name"] in ("ingress", "dispatcher", "sampler")]
    for each in kept:
        if each["name"] == "ingress":
            each["ray_actor_options"]["resources"] = {"front": 1}
        else:
            each["num_replicas"] = 2
    application["deployments"] = kept
    return ServeDeploySchema.model_validate(document)


def _count(replicas: int) -> dict[str, int]:
    return {"min": replicas, "max": replicas}


async def unleash(nodes: Nodes) -> Findings:
    """Jobs and blows at once; then no more blows until all jobs have ended; then the checks."""
    plan, findings = nodes.plan, Findings()
    async with httpx.AsyncClient(trust_env=False, timeout=10) as http:
        expected = await _outputs(http, nodes, await _submitted(http, nodes, range(CLIPS), 0.0), findings)
        undisturbed = len(_ran(nodes))
        findings.expect(undisturbed <= MOST_WORK * CLIPS * STEPS * UNITS, "units of undisturbed jobs:", undisturbed)
        rage, began = asyncio.create_task(nodes.rage()), time.monotonic()
        ids = await _submitted(http, nodes, range(CLIPS, CLIPS + plan.jobs), plan.over_s / plan.jobs)
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(rage), CALM_S)
        rage.cancel()
        await asyncio.wait([rage])
        if not rage.cancelled():
            rage.result()
        outputs = await _outputs(http, nodes, ids, findings)
    differing = [number for number, clip in outputs.items() if clip != expected[number % CLIPS]]
    findings.expect(not differing, "jobs with other bits than undisturbed ones:", differing)
    await _check_events(nodes, findings)
    ran = [unit for unit in _ran(nodes) if int(unit.split()[0]) >= CLIPS]
    needed = plan.jobs * STEPS * UNITS
    findings.expect(len(set(ran)) == needed, "units that were run:", len(set(ran)))
    findings.expect(len(ran) <= MOST_WORK * needed, "times the needed work:", len(ran) / needed)
    findings.figures |= {
        "jobs": plan.jobs,
        "seconds": round(time.monotonic() - began),
        "units needed": needed,
        "units run twice": len(ran) - len(set(ran)),
    }
    return findings


async def _submitted(http: httpx.AsyncClient, nodes: Nodes, numbers: range, pause_s: float) -> dict[int, str]:
    ids = {}
    for number in numbers:
        answer = await _ask(http, "POST", f"{nodes.url}/queue/{ENDPOINT}", json={"seed": number}, key=f"job {number}")
        ids[number] = answer.json()["request_id"]
        await asyncio.sleep(pause_s)
    return ids


async def _outputs(http: httpx.AsyncClient, nodes: Nodes, ids: dict[int, str], findings: Findings) -> dict[int, str]:
    """Job -> the hash of its clip, once all have ended."""
    deadline = time.monotonic() + nodes.plan.patience_s
    while (left := await _unended(nodes)) and time.monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.5)
    findings.expect(not left, "jobs that have not ended:", left)
    hashes = {}
    for number, request_id in ids.items():
        answer = await http.get(f"{nodes.url}/queue/{ENDPOINT}/requests/{request_id}")
        if answer.is_success and "video" in answer.json():
            clip = await _ask(http, "GET", answer.json()["video"]["url"])
            hashes[number] = sha256(clip.content).hexdigest()
        else:
            findings.faults.append(f"job {number} ended with {answer.status_code}: {answer.text[:300]}")
    return hashes


async def _ask(http: httpx.AsyncClient, method: str, url: str, key: str = "", **request: Any) -> httpx.Response:
    """Repeats a request until it is answered."""
    while True:
        with suppress(httpx.HTTPError):
            answer = await http.request(method, url, headers={"idempotency-key": key} if key else {}, **request)
            if answer.is_success:
                return answer
        await asyncio.sleep(0.3)


def _ran(nodes: Nodes) -> list[str]:
    """A line for each unit that was begun: seed, step, number."""
    return (nodes.settings.home / "units").read_text().splitlines()


async def _rows(nodes: Nodes, statement: str) -> list[Any]:
    connection = await asyncpg.connect(nodes.settings.database)
    try:
        return await connection.fetch(statement)
    finally:
        await connection.close()


async def _unended(nodes: Nodes) -> int:
    statement = "SELECT count(*) FROM jobs WHERE state NOT IN ('succeeded', 'failed', 'cancelled')"
    return int((await _rows(nodes, statement))[0][0])


async def _check_events(nodes: Nodes, findings: Findings) -> None:
    ended = "state IN ('succeeded', 'failed', 'cancelled')"
    ends = await _rows(nodes, f"SELECT job_id FROM job_events WHERE {ended} GROUP BY 1 HAVING count(*) > 1")
    findings.expect(not ends, "jobs that ended twice:", ends)
    states = Counter(row["state"] for row in await _rows(nodes, "SELECT state FROM jobs"))
    findings.expect(set(states) == {"succeeded"}, "jobs that did not succeed:", states)
    attempts = await _rows(nodes, "SELECT max(attempt) AS most, sum((attempt > 1)::int) AS again FROM jobs")
    findings.figures |= {"lost": nodes.plan.jobs + CLIPS - states.total(), "ended twice": len(ends)}
    findings.figures |= {"most attempts of a job": attempts[0]["most"], "jobs with more than one": attempts[0]["again"]}


def main() -> int:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # the S3 server's, a line a request
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--over-s", type=float, default=150.0, help="how long submissions take")
    parser.add_argument("--save", action="store_true", help="keep the figures")
    asked = parser.parse_args()
    report = Report("nodes", "What survives: three nodes of Ray under random blows", __doc__, "`make chaos`")
    report.console.print(f"seed {asked.seed}")
    with serving(Plan(asked.jobs, asked.seed, asked.over_s)) as nodes:
        findings = asyncio.run(unleash(nodes))
    for title, counts in ((f"{asked.jobs} jobs of {STEPS} steps of {UNITS} units", findings.figures), ("Blows", nodes.blows)):
        shown = table(title, "what", "count")
        for name, count in sorted(counts.items()):
            shown.add_row(name, f"{count:,}")
        report.add(shown)
    return report.conclude(findings.faults, save=asked.save)


if __name__ == "__main__":
    sys.exit(main())
