"""What a process tells its operator: logs, metrics and spans. Every process calls `begin_telemetry` once, at its start."""

from deployments import metrics, tracing
from deployments.hosting.logs import configure_logging
from deployments.settings import TelemetrySettings


def begin_telemetry(settings: TelemetrySettings, service: str, *, in_ray: bool) -> None:
    """service: the process's name in traces, e.g. "dispatcher". in_ray: it is Ray's process, so Ray exports its metrics."""
    configure_logging(settings.logs)
    if in_ray:
        from deployments.hosting import ray_metrics

        metrics.export_to(ray_metrics.record)
    if settings.otlp_endpoint is not None:
        tracing.export_to(settings.otlp_endpoint, service, settings.traces)
