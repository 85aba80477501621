"""Alert rules and the dashboard: sound, and about metrics that the coordinator has."""

import json
import re
import shutil
import subprocess

import helm_python
import pytest
import yaml

import chart

PROMTOOL = shutil.which("promtool")
# The suffixes of a histogram's series.
SUFFIXES = ("_bucket", "_sum", "_count")
RULES = yaml.safe_load(chart.ALERTS.read_text())
DASHBOARD = json.loads(chart.DASHBOARD.read_text())
PANELS = [p for p in DASHBOARD["panels"] if p["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
EXPRESSIONS = [rule["expr"] for group in RULES["groups"] for rule in group["rules"]]
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"] if "alert" in rule]


def promtool(*arguments):
    if PROMTOOL is None:
        pytest.fail("promtool is not there; deploy/install-deps.sh --tests installs it")
    result = subprocess.run(
        [PROMTOOL, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def metrics_without_source(expression):
    """Names of the product's in a query that no metric or rule of the product's provides."""
    known = chart.metrics()
    recorded = {r["record"] for g in RULES["groups"] for r in g["rules"] if "record" in r}
    names = set(re.findall(r"\bepserve[a-z0-9_:]+", re.sub(r'"[^"]*"', '""', expression)))
    missing = set()
    for name in names - recorded:
        stem = next((name.removesuffix(s) for s in SUFFIXES if name.endswith(s)), name)
        kind = known.get(name) or known.get(stem)
        if kind is None or (kind == "histogram") != (name != stem):
            missing.add(name)
    return missing


def label_values(label):
    """What the coordinator may give a label, from its source."""
    source = (chart.ROOT / "server" / "coordinator" / "metrics.cc").read_text()
    array = {"phase": "kPhaseNames", "state": "kWorkerStates"}[label]
    return set(re.findall(r'"([a-z]+)"', re.search(array + r" = \{([^}]*)\}", source).group(1)))


# absl's codes in lower case.
OUTCOMES = set(
    "ok cancelled unknown invalid_argument deadline_exceeded not_found already_exists "
    "permission_denied resource_exhausted failed_precondition aborted out_of_range unimplemented "
    "internal unavailable data_loss unauthenticated".split()
)


def labels_without_source(expression):
    found = set()
    for label, value in re.findall(r'\b(phase|state|outcome)[!=]~?"([^"]*)"', expression):
        known = OUTCOMES if label == "outcome" else label_values(label)
        found |= {f"{label}={each}" for each in value.split("|") if each not in known}
    return found


def test_the_source_gives_up_its_metrics():
    kinds = set(chart.metrics().values())
    assert len(chart.metrics()) >= 9 and kinds == {"counter", "gauge", "histogram"}
    assert {"queue", "ffn"} <= label_values("phase") and "serving" in label_values("state")


def test_a_query_of_what_is_not_there_would_be_found():
    assert metrics_without_source("rate(epserve_request_total[5m])") == {"epserve_request_total"}
    assert metrics_without_source("epserve_queue_depth_sum") == {"epserve_queue_depth_sum"}
    assert metrics_without_source("epserve_phase_seconds") == {"epserve_phase_seconds"}
    assert labels_without_source('x{phase="fnn"}') == {"phase=fnn"}
    assert labels_without_source('x{outcome=~"ok|error"}') == {"outcome=error"}


@pytest.mark.parametrize("expression", QUERIES + EXPRESSIONS)
def test_queries_are_about_metrics_and_labels_that_exist(expression):
    assert "epserve" in expression
    assert metrics_without_source(expression) == set()
    assert labels_without_source(expression) == set()


def test_panels_show_what_is_chosen():
    chosen = {variable["name"] for variable in DASHBOARD["templating"]["list"]} - {"datasource"}
    for query in QUERIES:
        for selector in re.findall(r"\bepserve_[a-z_]+(?:\{([^}]*)\})?", query):
            assert set(re.findall(r"=~\"\$(\w+)\"", selector)) == chosen, query


def test_every_metric_is_shown():
    shown = " ".join(QUERIES)
    assert {name for name in chart.metrics() if name not in shown} == set()


def test_promtool_accepts_the_rules():
    assert f"{len(EXPRESSIONS)} rules found" in promtool("check", "rules", str(chart.ALERTS))


def test_promtool_accepts_the_dashboards_queries(tmp_path):
    rules = []
    for number, query in enumerate(QUERIES):
        text = query.replace("$__rate_interval", "1m")
        text = re.sub(r"\$(job|namespace|release)\b", ".*", text)
        assert "$" not in text, query
        rules.append({"record": f"query{number}", "expr": text})
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(QUERIES)} rules found" in promtool("check", "rules", str(path))


def test_alerts_fire_when_they_should():
    assert "SUCCESS" in promtool("test", "rules", str(chart.ROOT / "tests/deploy/alerts_test.yml"))


def test_a_release_without_a_pod_is_missed_while_another_is_there(tmp_path):
    rules = chart.render(chart.values("gpu")).one("PrometheusRule")["spec"]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))

    def up(release, namespace, values):
        labels = f'job="epserve", namespace="{namespace}", app_kubernetes_io_instance="{release}"'
        return {"series": f"up{{{labels}}}", "values": values}

    series = [
        up(chart.RELEASE, chart.NAMESPACE, "1x5 _x10 1x10"),
        up("another", chart.NAMESPACE, "1x25"),
        up(chart.RELEASE, "another", "1x25"),
    ]
    firing = 'ALERTS{alertname="EpserveCoordinatorDown", alertstate="firing"}'
    counted = f"count by (app_kubernetes_io_instance, namespace, severity) ({firing})"
    labels = (
        f'{{app_kubernetes_io_instance="{chart.RELEASE}", '
        f'namespace="{chart.NAMESPACE}", severity="critical"}}'
    )
    cases = [
        {"expr": counted, "eval_time": "5m", "exp_samples": []},
        {"expr": counted, "eval_time": "13m", "exp_samples": [{"labels": labels, "value": 1}]},
        {"expr": counted, "eval_time": "20m", "exp_samples": []},
    ]
    test = {"interval": "1m", "input_series": series, "promql_expr_test": cases}
    path = tmp_path / "test.yml"
    path.write_text(
        yaml.safe_dump(
            {"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": [test]}
        )
    )
    assert "SUCCESS" in promtool("test", "rules", str(path))


def test_every_alert_has_a_test_and_a_place_in_the_manual():
    tested = (chart.ROOT / "tests/deploy/alerts_test.yml").read_text()
    manual = (chart.ROOT / "deploy" / "README.md").read_text()
    assert len({a["alert"] for a in ALERTS}) == len(ALERTS) > 0
    for alert in ALERTS:
        assert alert["alert"] in tested
        assert f"| `{alert['alert']}` |" in manual
        assert alert["labels"]["severity"] in ("critical", "warning", "info")
        assert set(alert["annotations"]) == {"summary", "description"}


def test_panels_lie_beside_each_other():
    cells = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not own & cells, panel["title"]
        cells |= own
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in PANELS)


def endpoint_and_coordinator(value_set, changes):
    rendered = chart.render(chart.merged(chart.values(value_set), changes))
    (endpoint,) = rendered.one("ServiceMonitor")["spec"]["endpoints"]
    return endpoint, rendered.coordinator()["spec"]["containers"][0]["args"]


def test_scrapes_show_what_the_coordinator_asks_for():
    endpoint, arguments = endpoint_and_coordinator("tls", {})
    assert endpoint["scheme"] == "https"
    tls = endpoint["tlsConfig"]
    assert tls["serverName"] == f"{chart.RELEASE}-epserve-control"
    assert (tls["ca"]["secret"], tls["cert"]["secret"], tls["keySecret"]) == tuple(
        {"name": "prometheus-tls", "key": key} for key in ("ca.crt", "tls.crt", "tls.key")
    )
    assert "--plaintext-metrics" not in arguments

    endpoint, arguments = endpoint_and_coordinator("secrets", {})
    assert endpoint["authorization"]["type"] == "Bearer"
    assert endpoint["authorization"]["credentials"] == {"name": "epserve-secrets", "key": "metrics"}
    assert "scheme" not in endpoint and "--plaintext-metrics" not in arguments

    open_to_all = {"coordinator": {"plaintextMetrics": True}}
    for value_set in ("tls", "secrets"):
        endpoint, arguments = endpoint_and_coordinator(value_set, open_to_all)
        assert set(endpoint) == {"port", "path", "interval"}
        assert "--plaintext-metrics" in arguments


def test_scrapes_over_tls_without_a_certificate_are_refused():
    none = {"monitoring": {"serviceMonitor": {"tlsSecretName": ""}}}
    with pytest.raises(helm_python.HelmError, match="tlsSecretName"):
        endpoint_and_coordinator("tls", none)
    endpoint_and_coordinator("tls", chart.merged(none, {"coordinator": {"plaintextMetrics": True}}))


def test_the_chart_ships_rules_dashboard_and_scrape_as_they_are():
    rendered = chart.render(chart.values("gpu"))
    *groups, own = rendered.one("PrometheusRule")["spec"]["groups"]
    assert groups == RULES["groups"] and len(own["rules"]) == 1
    unscraped = {"monitoring": {"serviceMonitor": {"enabled": False}}}
    unscraped = chart.render(chart.merged(chart.values("gpu"), unscraped))
    assert unscraped.one("PrometheusRule")["spec"] == RULES
    data = rendered.one("ConfigMap", "-dashboard")["data"]
    assert json.loads(data["epserve.json"]) == DASHBOARD
    monitor = rendered.one("ServiceMonitor")["spec"]
    # It finds the one service that has metrics, ready or not, and names the job as the rules do.
    wanted = monitor["selector"]["matchLabels"]
    (service,) = [
        s for s in rendered.of("Service") if chart.selects(wanted, s["metadata"]["labels"])
    ]
    assert service["spec"]["publishNotReadyAddresses"] is True
    (endpoint,) = monitor["endpoints"]
    assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]
    job = service["metadata"]["labels"][monitor["jobLabel"]]
    assert f'up{{job="{job}"}}' in " ".join(EXPRESSIONS)
    (copied,) = monitor["targetLabels"]
    assert service["metadata"]["labels"][copied] == chart.RELEASE
    # Prometheus' spelling of it keeps releases apart wherever rules aggregate.
    label = re.sub(r"[^a-zA-Z0-9_]", "_", copied)
    for expression in EXPRESSIONS:
        for grouping in re.findall(r"\bby \(([^)]*)\)", expression):
            assert {"namespace", "job", label} <= set(grouping.split(", ")), expression
    plain = chart.render(chart.values("cpu"))
    for kind in ("ServiceMonitor", "PrometheusRule", "ConfigMap"):
        assert plain.of(kind) == []
