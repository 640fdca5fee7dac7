"""Alerts and the dashboard: every expression is PromQL, and every metric in it is one that the service exports."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

import promql_parser
import pytest
import ray
import yaml
from pydantic import BaseModel, ConfigDict, Field

from deployments import metrics

PANELS: list[dict[str, Any]] = json.loads(Path("cluster/grafana_dashboard.json").read_text())["panels"]
RULES = Path("cluster/prometheus_rules.yaml")
CASES = Path("tests/cluster/alerts.test.yaml")
VARIABLES = {"$__rate_interval": "5m", "$endpoint": ".*"}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


Duration = Field(None, pattern=r"^(\d+(ms|[smhdwy]))+$")


class Rule(Strict):
    """An alerting rule as Prometheus's `rulefmt` has it."""

    alert: str = Field(pattern="^Reelray[A-Za-z]+$")
    expr: str
    for_: str | None = Field(None, alias="for", pattern=r"^(\d+(ms|[smhdwy]))+$")
    keep_firing_for: str | None = Duration
    labels: dict[Literal["severity"], Literal["page", "ticket"]]
    annotations: dict[Literal["summary", "description"], str]


class Group(Strict):
    name: str
    interval: str | None = Duration
    limit: int | None = None
    rules: list[Rule]


class Rules(Strict):
    groups: list[Group]


def rules() -> list[Rule]:
    parsed = Rules.model_validate(yaml.safe_load(RULES.read_text()))
    return [rule for group in parsed.groups for rule in group.rules]


def expressions() -> dict[str, str]:
    """Where it stands -> PromQL, with Grafana's variables filled in."""
    found = {f"{rule.alert}": rule.expr for rule in rules()}
    for panel in PANELS:
        for target in panel.get("targets", ()):
            found[f"{panel['title']} {target['refId']}"] = target["expr"]
    for variable, value in VARIABLES.items():
        found = {where: expression.replace(variable, value) for where, expression in found.items()}
    return found


@cache
def rays_own() -> str:
    """The source in which Ray names its metrics: of Serve, and of the dashboards that Ray brings along."""
    root = Path(ray.__file__).parent
    files = [*root.glob("serve/_private/**/*.py"), *root.glob("dashboard/modules/metrics/dashboards/*.py")]
    return "\n".join(file.read_text() for file in files)


def is_exported(name: str) -> bool:
    if name.startswith("ray_reelray_"):
        return any(name in metric.exported_as for metric in metrics.CATALOGUE)
    names = {name, name.removeprefix("ray_")}
    names |= {each.removesuffix(suffix) for each in names for suffix in ("_bucket", "_sum", "_count", "_total")}
    return any(re.search(rf"\b{each}\b", rays_own()) for each in names)


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"\bray_[a-z0-9_]+", expression))


@pytest.mark.parametrize(("where", "expression"), expressions().items(), ids=expressions())
def test_an_expression_is_promql_over_metrics_that_are_exported(where: str, expression: str):
    promql_parser.parse(expression)
    assert names_in(expression)
    assert not [name for name in names_in(expression) if not is_exported(name)]


def test_alerts_fire_when_they_should_and_only_then():
    """Without promtool only their syntax and names are checked, by the other tests."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian's package `prometheus` has it)")
    done = subprocess.run([promtool, "check", "rules", RULES], capture_output=True, text=True, check=False)
    assert f"SUCCESS: {len(rules())} rules found" in done.stdout, done.stderr
    done = subprocess.run(
        [promtool, "test", "rules", "tests/cluster/alerts.test.yaml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_names_that_nobody_exports_are_found():
    assert not is_exported("ray_reelray_jobs_qeued")
    assert not is_exported("ray_reelray_attempts")  # a counter has a suffix
    assert not is_exported("ray_serve_replicas_lost_total")
    with pytest.raises(ValueError, match="invalid"):
        promql_parser.parse("sum by endpoint (x)")


def test_tags_in_an_expression_are_the_metrics_own():
    by_name = {name: metric for metric in metrics.CATALOGUE for name in metric.exported_as}
    for where, expression in expressions().items():
        for name, matchers in re.findall(r"\b(ray_reelray_[a-z_]+)(?:\{([^}]*)\})?", expression):
            used = set(re.findall(r'(\w+)\s*(?:=~|=|!=|!~)\s*"', matchers))
            assert used <= set(by_name[name].tags), (where, name)
        grouped = {tag for tags in re.findall(r"by \(([^)]*)\)", expression) for tag in re.split(r",\s*", tags)}
        ours = {tag for name in names_in(expression) if name in by_name for tag in by_name[name].tags}
        assert grouped <= ours | {"le", "application", "deployment"}, where


def test_every_metric_of_ours_is_drawn_or_watched():
    used = {name for expression in expressions().values() for name in names_in(expression)}
    unused = [metric.name for metric in metrics.CATALOGUE if not used & set(metric.exported_as)]
    assert not unused


def test_every_alert_says_what_to_look_at_and_is_named_once():
    assert len({rule.alert for rule in rules()}) == len(rules()) > 10
    assert all(rule.annotations.keys() == {"summary", "description"} for rule in rules())
    for rule in rules():
        grouped = {tag for tags in re.findall(r"by \(([^)]*)\)", rule.expr) for tag in re.split(r",\s*", tags)}
        told = set(re.findall(r"\$labels\.(\w+)", " ".join(rule.annotations.values())))
        assert told <= grouped, rule.alert


def test_the_dashboards_panels_have_ids_of_their_own_and_do_not_overlap():
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        cells = set(cells_of(panel["gridPos"]))
        assert not taken & cells, panel["title"]
        taken |= cells
        assert panel["type"] in ("row", "stat", "timeseries")
        assert panel["type"] == "row" or panel["targets"]
    assert max(x for x, _ in taken) < 24


def cells_of(at: dict[str, int]) -> Iterator[tuple[int, int]]:
    for x in range(at["x"], at["x"] + at["w"]):
        for y in range(at["y"], at["y"] + at["h"]):
            yield x, y
