"""Exports our metrics through Ray's, which every node's agent shows to Prometheus."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from deployments.metrics import Metric


def record(metric: Metric, value: float, tags: Mapping[str, str]) -> None:
    """See `metrics.export_to`."""
    made = _made(metric)
    if metric.kind == "counter":
        if value > 0:  # Ray refuses nothing else
            made.inc(value, tags=dict(tags))
    elif metric.kind == "gauge":
        made.set(value, tags=dict(tags))
    else:
        made.observe(value, tags=dict(tags))


@cache
def _made(metric: Metric) -> Any:
    if metric.kind == "histogram":
        return Histogram(metric.name, metric.description, boundaries=list(metric.boundaries_s), tag_keys=metric.tags)
    kind = Counter if metric.kind == "counter" else Gauge
    return kind(metric.name, metric.description, tag_keys=metric.tags)
