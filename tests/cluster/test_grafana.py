"""The dashboard shows every metric that the service declares, under Ray's name for it, and no other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import promql_parser as promql
import pytest

from actors.metrics import COMMON, METRICS, Metric
from tests.support.local_ray import ROOT

DASHBOARD = json.loads((ROOT / "cluster" / "grafana.json").read_text(encoding="utf-8"))
DOCS = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
ROWS = ["Clients", "Decoding", "Capacity", "Faults"]
VARIABLES = {"$__rate_interval": "1m", "$application": ".*"}


def exported(metric: Metric) -> str:
    """The name under which Ray exports a metric's series."""
    return f"ray_{metric.name}" + {"counter": "_total", "gauge": "", "histogram": "_bucket"}[metric.kind]


EXPORTED = {exported(metric): metric for metric in METRICS.values()}


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def parsed(expression: str) -> promql.Expr:
    """An expression with Grafana's variables filled in. Raises ValueError for invalid PromQL."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression
    return promql.parse(expression)


def nodes(expression: promql.Expr) -> Iterator[promql.Expr]:
    found: list[promql.Expr] = []
    promql.walk(expression, found.append)
    yield from found


def selectors(expression: promql.Expr) -> list[promql.VectorSelector]:
    inside = [n.vector_selector if isinstance(n, promql.MatrixSelector) else n for n in nodes(expression)]
    return [each for each in inside if isinstance(each, promql.VectorSelector)]


def labels_of(name: str) -> set[str]:
    metric = EXPORTED[name]
    return {*COMMON, *metric.labels, *(["le"] if metric.kind == "histogram" else [])}


@pytest.mark.parametrize("expression", expressions())
def test_an_expression_selects_exported_metrics_and_labels(expression: str) -> None:
    asked = selectors(parsed(expression))
    assert asked
    for selector in asked:
        assert selector.name in EXPORTED
        matched = {matcher.name for matcher in selector.matchers.matchers}
        assert "application" in matched
        assert matched <= labels_of(selector.name)


@pytest.mark.parametrize("expression", expressions())
def test_an_expression_groups_by_existing_labels(expression: str) -> None:
    for node in nodes(parsed(expression)):
        if isinstance(node, promql.AggregateExpr) and node.modifier is not None:
            for selector in selectors(node):
                assert selector.name is not None
                assert set(node.modifier.labels) <= labels_of(selector.name)


@pytest.mark.parametrize("expression", expressions())
def test_counters_are_shown_as_rates_and_gauges_as_values(expression: str) -> None:
    tree = parsed(expression)
    over_time = [n.vector_selector.name for n in nodes(tree) if isinstance(n, promql.MatrixSelector)]
    for selector in selectors(tree):
        assert selector.name is not None
        assert (selector.name in over_time) == (EXPORTED[selector.name].kind != "gauge")


def test_a_legend_uses_labels_that_its_expression_keeps() -> None:
    for panel in panels():
        for target in panel["targets"]:
            kept: set[str] = set()
            for node in nodes(parsed(target["expr"])):
                if isinstance(node, promql.AggregateExpr) and node.modifier is not None:
                    kept |= set(node.modifier.labels) - {"le"}
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) == kept, panel["title"]


def test_every_declared_metric_is_shown() -> None:
    shown = {selector.name for expression in expressions() for selector in selectors(parsed(expression))}
    assert shown == set(EXPORTED)


def test_the_rows_are_clients_decoding_capacity_and_faults() -> None:
    assert [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"] == ROWS
    (variable,) = (each for each in DASHBOARD["templating"]["list"] if each["name"] == "application")
    name, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"]).groups()  # type: ignore[union-attr]
    assert label in labels_of(name)


def test_panels_neither_overlap_nor_share_an_id() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        area = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not area & taken
        assert max(x for x, _ in area) < 24
        taken |= area


def test_the_documentation_lists_every_metric_with_its_kind_and_labels() -> None:
    rows = re.findall(r"^\| `(thinklogit_\w+)` \| (\w+) \| ([^|]*) \|", DOCS, re.MULTILINE)
    listed = {name: (kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    assert len(listed) == len(rows)
    assert listed == {name: (metric.kind, metric.labels) for name, metric in METRICS.items()}
