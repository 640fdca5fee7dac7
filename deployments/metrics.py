"""Every metric of ours: its name, its tags and what it counts. `cluster/` draws and watches these, and tests compare the names.

Code records through a `Metric`, which knows neither Ray nor Prometheus. In Ray's processes `hosting/telemetry.py` exports to
Ray's metrics, which Prometheus reads from every node as `ray_<name>`, a counter as `ray_<name>_total`. A gateway exports none.
Tags never hold what callers choose, or a caller could make any number of series.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]

_SHORT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_LONG_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 3600.0, 7200.0)

Export = Callable[["Metric", float, Mapping[str, str]], None]
_exports: list[Export] = []


@dataclass(frozen=True)
class Metric:
    """tags: the names of its tags. boundaries_s: of a histogram's buckets, in seconds."""

    name: str
    kind: Kind
    description: str
    tags: tuple[str, ...] = ()
    boundaries_s: tuple[float, ...] = ()

    def record(self, value: float = 1.0, **tags: str) -> None:
        """Adds to a counter, sets a gauge, or observes a histogram's value."""
        assert tags.keys() == set(self.tags), f"{self.name} has the tags {self.tags}"
        for export in _exports:
            export(self, value, tags)

    @property
    def exported_as(self) -> tuple[str, ...]:
        """The names of its series in Prometheus."""
        suffixes = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
        return tuple(f"ray_{self.name}{suffix}" for suffix in suffixes[self.kind])


def export_to(export: Export) -> None:
    """From now on this process's metrics go there as well."""
    _exports.append(export)


def stop_export(export: Export) -> None:
    """Takes `export_to` back."""
    _exports.remove(export)


# The queue, as the database says: every dispatcher sets the same, so take the maximum of a gauge over all replicas.
QUEUED = Metric("reelray_jobs_queued", "gauge", "Jobs that wait, those for their next attempt included.", ("endpoint",))
DELAYED = Metric("reelray_jobs_delayed", "gauge", "Queued jobs that wait for their next attempt.", ("endpoint",))
RUNNING = Metric("reelray_jobs_running", "gauge", "Jobs that a dispatcher works on.", ("endpoint",))
OLDEST = Metric("reelray_oldest_job_seconds", "gauge", "How long ago the oldest queued job was submitted.", ("endpoint",))
PAUSED = Metric("reelray_endpoint_paused", "gauge", "1 while no job of the endpoint may start.", ("endpoint",))
WEBHOOKS = Metric("reelray_webhooks_waiting", "gauge", "Webhooks that are not delivered yet and will be tried again.")
OLDEST_WEBHOOK = Metric("reelray_oldest_webhook_seconds", "gauge", "How long ago the job of the oldest of them ended.")
DATABASE = Metric("reelray_database_up", "gauge", "1 while the dispatcher can read the database.")

# Jobs
SUBMITTED = Metric("reelray_jobs_submitted", "counter", "Submissions that this ingress stored.", ("endpoint",))
WAIT = Metric("reelray_wait_seconds", "histogram", "From submission to the first attempt.", ("endpoint",), _LONG_S)
ATTEMPTS = Metric(
    "reelray_attempts",
    "counter",
    "Attempts that ended. outcome: succeeded, failed, rejected (a fault of the request), retried, cancelled, released, lost.",
    ("endpoint", "outcome"),
)
RETRIES = Metric(
    "reelray_retries", "counter", "Attempts that are tried again. reason: the type of the error.", ("endpoint", "stage", "reason")
)
CANCELS = Metric("reelray_cancels", "counter", "Cancel requests, by the state in which they found the job.", ("state",))
SWEPT = Metric("reelray_jobs_swept", "counter", "Jobs whose worker fell silent, or whose deadline passed.")

# Stages
STAGE_WAIT = Metric("reelray_stage_wait_seconds", "histogram", "From a stage's call to its turn.", ("endpoint", "stage"), _LONG_S)
STAGE = Metric("reelray_stage_seconds", "histogram", "Work of a stage on a job.", ("endpoint", "stage"), _LONG_S)
UNIT = Metric("reelray_unit_seconds", "histogram", "Work of a replica on a unit of denoising.", ("endpoint",), _SHORT_S)
UNIT_WAIT = Metric("reelray_unit_wait_seconds", "histogram", "From when a unit could run to its turn.", ("endpoint",), _SHORT_S)
UNITS_AGAIN = Metric(
    "reelray_units_again",
    "counter",
    "Units given to another replica. reason: lost (with its replica), straggler (run twice), moved (it waited behind another).",
    ("endpoint", "reason"),
)
GPU = Metric("reelray_gpu_seconds", "counter", "Seconds that GPUs worked in stages that ended well.", ("endpoint", "stage"))
JOB_GPU = Metric("reelray_job_gpu_seconds", "histogram", "The same for each job that succeeded.", ("endpoint",), _LONG_S)

# Webhooks
DELIVERIES = Metric("reelray_webhook_attempts", "counter", "Deliveries tried. outcome: delivered, refused.", ("outcome",))
DELIVERY = Metric("reelray_webhook_seconds", "histogram", "An attempt at a webhook.", (), _SHORT_S)

# Scaling, as the autoscaling policy has written it into the database; every dispatcher sets the same
BACKLOG = Metric("reelray_backlog_seconds", "gauge", "Waiting work in seconds of its replicas.", ("endpoint", "stage"))
TARGET = Metric("reelray_replicas_target", "gauge", "Replicas that the autoscaling policy wants.", ("endpoint", "stage"))
REPLICAS = Metric("reelray_replicas", "gauge", "Replicas that run.", ("endpoint", "stage"))
READY = Metric("reelray_replica_ready_seconds", "gauge", "How long a new replica takes to be ready.", ("endpoint", "stage"))
SCALING_AGE = Metric("reelray_scaling_age_seconds", "gauge", "How long ago the autoscaling policy last wrote.")
SCALINGS = Metric(
    "reelray_scaling_decisions", "counter", "Changed targets. direction: up, down.", ("endpoint", "stage", "direction")
)

CATALOGUE = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
