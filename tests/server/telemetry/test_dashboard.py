"""The dashboard asks for nothing that `/metrics` does not have."""

import json
import re
from pathlib import Path

import httpx
import yaml
from prometheus_client.parser import text_string_to_metric_families

MONITORING = Path(__file__).parent.parent.parent.parent / "configs" / "monitoring"
METRIC = r"(?:vllm:|jaxserve:|process_|jaxserve_engine_)\w+"
TARGET_LABELS = {"job", "instance"}  # which Prometheus adds


def labels_by_sample(client: httpx.Client) -> dict[str, set[str]]:
    client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 2})
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for name in (family.name, *(f"{family.name}_{part}" for part in ("total", "bucket", "sum", "count"))):
            if any(sample.name == name for sample in family.samples) or family.type == "counter":
                labels.setdefault(name, set()).update(*(s.labels for s in family.samples if s.name == name))
    return labels


def test_every_metric_of_the_dashboard_exists_with_the_labels_that_it_selects_by(client: httpx.Client) -> None:
    board = json.loads((MONITORING / "grafana-dashboard.json").read_text())
    known = labels_by_sample(client)
    queries = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    queries += [variable["definition"] for variable in board["templating"]["list"] if variable["type"] == "query"]
    assert len(queries) > 40
    asked = set()
    for query in queries:
        for name, matchers in re.findall(rf"({METRIC})(?:{{([^}}]*)}})?", query):
            asked.add(name)
            assert name in known, f"{name} of {query}"
            selected = set(re.findall(r"(\w+)=", matchers))
            assert selected - TARGET_LABELS <= known[name], query
        wanted = {label.strip() for by in re.findall(r"by \(([^)]*)\)", query) for label in by.split(",")}
        assert all(any(label in known[name] for name in re.findall(METRIC, query)) for label in wanted), query
    assert len(asked) > 30


def test_every_panel_says_what_it_shows_and_lies_within_the_board() -> None:
    board = json.loads((MONITORING / "grafana-dashboard.json").read_text())
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
        assert panel["type"] == "row" or panel["description"]
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)


def test_prometheus_config_names_the_default_port() -> None:
    config = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    assert config["scrape_configs"][0]["static_configs"] == [{"targets": ["localhost:8000"]}]
