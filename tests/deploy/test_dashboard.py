"""The dashboard shows what /metrics has, by labels that it has, and says in what unit."""

import json
import re
from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("promql_parser")
import promql_parser as promql

from adadiff.serving.drawn import Drawn
from adadiff.serving.metrics import Metrics
from deploy.recipe import ROOT
from serving.apps import tiny

BOARD = json.loads((ROOT / "deploy" / "grafana.json").read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
DEPLOYMENT = (ROOT / "docs" / "deployment.md").read_text()
ALERTS = re.findall(r"^\| `(.*?)` \|", DEPLOYMENT.partition("| condition |")[2], re.MULTILINE)
UNITS = {"short", "ops", "reqps", "percentunit", "s", "bytes"}  # as Grafana calls them
SCRAPED = {"instance"}  # a label that Prometheus adds


def parsed(expression: str) -> object:
    for name, value in {"$__rate_interval": "1m", "$model": ".*", "$instance": ".*"}.items():
        expression = expression.replace(name, value)
    assert "$" not in expression
    return promql.parse(expression)


def nodes(node: object) -> Iterator[object]:
    """Of a parsed expression, from the outside inwards."""
    yield node
    inner = [getattr(node, name, None) for name in ("expr", "lhs", "rhs", "vector_selector")]
    for one in (*inner, *(getattr(node, "args", None) or ())):
        if one is not None:
            yield from nodes(one)


def read(expression: str) -> list[tuple[str, set[str]]]:
    """Metrics of an expression, each with the labels that it is chosen by; then those that results are grouped by."""
    found = [node for node in nodes(parsed(expression)) if isinstance(node, promql.VectorSelector)]
    return [(node.name, {matcher.name for matcher in node.matchers.matchers}) for node in found]


def groups(expression: str) -> list[tuple[set[str], set[str]]]:
    """Of each aggregation: its labels, and the metrics within."""
    found = [node for node in nodes(parsed(expression)) if isinstance(node, promql.AggregateExpr)]
    inside = [{one.name for one in nodes(node) if isinstance(one, promql.VectorSelector)} for node in found]
    labels = [set(node.modifier.labels) if node.modifier is not None else set() for node in found]
    return list(zip(labels, inside, strict=True))


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """Labels of all that /metrics has, by name, once there was a request of each kind."""
    served = tiny()
    try:
        metrics = Metrics({served.name: served})
        layers = np.full((3, 2), 2, np.uint8)
        metrics.drawn(served.name, Drawn(0, 5, layers, waited=0.1, seconds=0.2, blocks=12, passes=6))
        metrics.replied(served.name, 0.0)
        metrics.failed("invalid_value")
        metrics.http("/v1/models", 200)
        samples = [sample for family in metrics.registry.collect() for sample in family.samples]
        return {sample.name: set(sample.labels) for sample in samples}
    finally:
        served.engine.close()


def test_every_metric_is_exported_with_the_labels_it_is_chosen_by(exported: dict[str, set[str]]) -> None:
    asked = [one for expression in EXPRESSIONS for one in read(expression)]
    assert len(asked) > 30
    assert not {name for name, _ in asked} - set(exported)
    assert not [(name, labels) for name, labels in asked if labels - exported[name] - SCRAPED]
    for expression in EXPRESSIONS:
        for labels, metrics in groups(expression):
            assert metrics
            assert not [name for name in metrics if labels - exported[name] - SCRAPED], expression


def test_alerts_are_of_what_is_exported(exported: dict[str, set[str]]) -> None:
    read_by = [read(alert.replace("\\|", "|")) for alert in ALERTS]
    assert len(read_by) == 4
    assert not {name for alert in read_by for name, _ in alert} - set(exported) - {"up"}


def test_every_metric_is_shown(exported: dict[str, set[str]]) -> None:
    shown = {name for expression in EXPRESSIONS for name, _ in read(expression)}
    parts = ("_bucket", "_sum", "_count")  # of a histogram; one of them shows it

    def family(name: str) -> str:
        whole = next((name.removesuffix(part) for part in parts if name.endswith(part)), name)
        return whole if f"{whole}_bucket" in exported else name

    own = {family(name) for name in exported if name.startswith("adadiff_") and not name.endswith("_created")}
    assert len(own) == 18
    assert own == {family(name) for name in shown if name.startswith("adadiff_")}


def test_counters_are_rates_and_quantiles_are_of_buckets() -> None:
    for expression in EXPRESSIONS:
        calls = [node for node in nodes(parsed(expression)) if isinstance(node, promql.Call)]
        for call in calls:
            inside = [one.name for one in nodes(call) if isinstance(one, promql.VectorSelector)]
            if call.func.name in ("rate", "increase"):
                assert inside[0].endswith(("_total", "_bucket", "_sum", "_count")), expression
            if call.func.name == "histogram_quantile":
                assert all(name.endswith("_bucket") for name in inside), expression
                (labels, _), *_ = groups(expression)
                assert "le" in labels, expression
        in_rates = {one.name for call in calls for one in nodes(call) if isinstance(one, promql.VectorSelector)}
        bare = {name for name, _ in read(expression)} - in_rates
        assert not [name for name in bare if name.endswith(("_total", "_bucket", "_sum", "_count"))], expression


def test_panels_are_titled_explained_and_have_units() -> None:
    titles = [panel["title"] for panel in PANELS]
    wanted = ("Requests", "Waiting", "Request latency", "Queue wait", "Exit layers", "Blocks left out", "Failures")
    assert set(wanted) <= set(titles)
    for panel in PANELS:
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert [target["refId"] for target in panel["targets"]] == list("ABC")[: len(panel["targets"])]
        if len(panel["targets"]) > 1:
            assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]
    shares = [panel for panel in PANELS if panel["fieldConfig"]["defaults"]["unit"] == "percentunit"]
    assert {panel["title"] for panel in shares} == {"Blocks left out", "Work left out", "Share left out, by image"}


def test_panels_have_ids_and_places_of_their_own() -> None:
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert place["x"] + place["w"] <= 24
        assert not taken & cells, panel["title"]
        taken |= cells


def test_variables_come_from_metrics(exported: dict[str, set[str]]) -> None:
    named = {variable["name"]: variable for variable in BOARD["templating"]["list"]}
    assert list(named) == ["datasource", "model", "instance"]
    for name in ("model", "instance"):
        assert named[name]["definition"] == f"label_values(adadiff_engine_up, {name})"
        assert any(f'{name}=~"${name}"' in expression for expression in EXPRESSIONS)
    assert "model" in exported["adadiff_engine_up"]
