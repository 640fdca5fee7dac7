"""The product's autoscaling and Serve's default one in the simulated cluster, each within Serve's own code around a policy."""

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import ray.serve.autoscaling_policy as serve_policy
from ray.serve._private.common import DeploymentID
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from deployments.dispatch.autoscaling import BacklogPolicy
from deployments.dispatch.backlog import ARRIVALS_S, STAGES, Pace, Reading, learn, loads, name_of
from deployments.jobs.work import Arrived, Measured, Running, Waiting
from deployments.settings import ScaledEndpoint
from tests.load.simulate.cluster import DENOISE, Cluster, Pool
from tests.load.simulate.scheduling import Job
from tests.load.simulate.trace import Kind

APP = "reelray"


@contextmanager
def clock_of(now: Any) -> Iterator[None]:
    """Serve's own delays run on the simulation's clock. now: a function of no arguments."""
    real = serve_policy.time
    serve_policy.time = SimpleNamespace(time=now, monotonic=now)
    try:
        yield
    finally:
        serve_policy.time = real


def context(name: str, pool: Pool, cluster: Cluster, config: AutoscalingConfig, state: dict[str, Any], requests: float) -> Any:
    """What Serve tells a policy."""
    return AutoscalingContext(
        deployment_id=DeploymentID(name, APP),
        deployment_name=name,
        app_name=APP,
        current_num_replicas=pool.ready,
        target_num_replicas=pool.target,
        running_replicas=[],
        total_num_requests=requests,
        total_queued_requests=requests,
        aggregated_metrics={},
        raw_metrics={},
        capacity_adjusted_min_replicas=cluster.trace.lowest,
        capacity_adjusted_max_replicas=cluster.trace.highest,
        policy_state=state,
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=cluster.now,
        config=config,
    )


class Ours:
    """`BacklogPolicy` on readings that the simulation makes as the reader's thread would, once a second."""

    name = "ours"

    def __init__(self, kind: Kind, highest: int, every_s: float = 1.0, idle_s: float = 300.0):
        self.every_s = every_s
        self.endpoint = ScaledEndpoint(f"fal-ai/{kind.family}", kind.family, kind.stage_s, kind.drain_s, idle_s)
        self.paces = {self.endpoint.id: [Pace(3 * seconds) for seconds in kind.stage_s]}  # the prior is wrong by a factor
        self.names = [name_of(self.endpoint, stage) for stage in STAGES]
        self.config = AutoscalingConfig(min_replicas=0, max_replicas=highest, upscale_delay_s=0, downscale_delay_s=0)
        self.reader = SimpleNamespace(reading=None, decisions={}, start=lambda: None, stop=lambda: None)
        self.now = 0.0
        self.policy = BacklogPolicy(self.reader, lambda: self.now)  # type: ignore[arg-type]
        self.decide = serve_policy._apply_app_level_autoscaling_config(self.policy)
        self.states: dict[str, dict[str, Any]] = {name: {} for name in self.names}
        self.slowest_s = 0.0
        self.seen = 0

    def targets(self, now: float, cluster: Cluster) -> list[int]:
        """See `Autoscaler`."""
        self.now = now
        self.reader.reading = Reading(now, {self.endpoint: self._loads(now, cluster)})
        contexts = {
            DeploymentID(name, APP): context(name, pool, cluster, self.config, self.states[name], float(len(pool.jobs)))
            for name, pool in zip(self.names, cluster.pools, strict=True)
        }
        began = time.thread_time()
        answer, states = self.decide(contexts)
        self.slowest_s = max(self.slowest_s, time.thread_time() - began)
        self.states = {key.name: state for key, state in states.items()}
        return [answer.get(key, contexts[key].target_num_replicas) for key in contexts]

    def _loads(self, now: float, cluster: Cluster) -> Any:
        """As the database would tell it. A job is one unit of each stage."""
        learn(self.paces, [self._measured(each) for each in cluster.ended[self.seen :]])
        self.seen = len(cluster.ended)
        counts = [(each, len(cluster.arrived) - bisect_left(cluster.arrived, now - each)) for each in ARRIVALS_S]
        arrived = [Arrived(each, count, (count,) * 3) for each, count in counts if count]
        queued, width = len(cluster.queue), cluster.kind.width
        waiting = Waiting(queued, (queued,) * 3, queued * width)
        running = [self._running(job, width) for pool in cluster.pools for job in pool.jobs]
        times = [pace.unit_s for pace in self.paces[self.endpoint.id]]
        return loads(times, waiting, running, arrived)

    def _running(self, job: Job, width: int) -> Running:
        begun = max(job.began, default=None)
        fraction = job.fraction if begun == job.stage else 1.0
        return Running(self.endpoint.id, (1.0, 1.0, 1.0), width, None if begun is None else STAGES[begun], fraction)

    def _measured(self, stage_s: Sequence[float]) -> Measured:
        return Measured(self.endpoint.id, (1.0, 1.0, 1.0), dict(zip(STAGES, stage_s, strict=True)))


class ServeDefault:
    """Serve's `replica_queue_length_autoscaling_policy` with the delays of `AutoscalingConfig`.

    It is given what it is made for: every job is a request that waits at its stage's handle, those in the queue at that of the
    denoisers. Its metrics come without the delay of ten seconds with which Serve's handles send them. options: of
    `AutoscalingConfig`.
    """

    def __init__(self, name: str, highest: int, every_s: float = 1.0, **options: Any):
        self.name, self.every_s = name, every_s
        options = {"target_ongoing_requests": 1} | options
        self.config = AutoscalingConfig(min_replicas=0, max_replicas=highest, **options)
        self.decide = serve_policy._apply_autoscaling_config(serve_policy._core_replica_queue_length_policy)
        self.states: list[dict[str, Any]] = [{} for _ in STAGES]
        self.requests: list[deque[tuple[float, int]]] = [deque() for _ in STAGES]
        self.slowest_s = 0.0

    def targets(self, now: float, cluster: Cluster) -> list[int]:
        """See `Autoscaler`."""
        found = []
        with clock_of(lambda: now):
            for stage, pool in enumerate(cluster.pools):
                seen = self.requests[stage]
                seen.append((now, len(pool.jobs) + len(cluster.queue) * (stage == DENOISE)))
                while seen[0][0] < now - self.config.look_back_period_s:
                    seen.popleft()
                mean = sum(count for _, count in seen) / len(seen)
                told = context(STAGES[stage], pool, cluster, self.config, self.states[stage], mean)
                began = time.thread_time()
                target, self.states[stage] = self.decide(told)
                self.slowest_s = max(self.slowest_s, time.thread_time() - began)
                found.append(target)
        return found
