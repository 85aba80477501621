"""Prometheus beside the service: it scrapes, its rules are sound, the dashboard has answers."""

import json

import numpy as np
import pytest

from cluster import ROOT, wait_until
from infer import Load, random_batch

DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "epserve.json").read_text())
QUERIES = [
    (panel["title"], target["expr"])
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", [])
]
# What Grafana puts in for variables.
VARIABLES = {"$__rate_interval": "30s", "$namespace": ".*", "$job": ".*", "$release": ".*"}


@pytest.fixture(scope="module")
def scraped(stack, served):
    """The stack once it has been scraped twice with requests between."""
    batch = random_batch(served.spec, np.random.default_rng(7), 32)
    with Load(stack, batch, served.ffn(*batch), concurrency=2):
        tokens = "rate(epserve_tokens_total[30s]) > 0"
        wait_until(lambda: stack.query(tokens), 30, "tokens are counted")
        yield stack


def test_coordinator_is_scraped(scraped):
    targets = scraped.prometheus("targets")["activeTargets"]
    assert [(t["labels"]["job"], t["health"]) for t in targets] == [("epserve", "up")], targets
    serving = 'epserve_workers{state="serving"} == 4'
    wait_until(lambda: scraped.query(serving), 15, "a scrape after all serve")


@pytest.mark.parametrize("title, expression", QUERIES)
def test_query_of_the_dashboard_has_an_answer(scraped, title, expression):
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, "a variable that this test does not know"
    result = scraped.query(expression)
    assert result, f"{title}: nothing for {expression}"
    assert all(sample["value"][1] not in ("NaN", "+Inf") for sample in result), result


def test_rules_are_loaded_and_evaluate(scraped):
    def evaluated():
        rules = [r for group in scraped.prometheus("rules")["groups"] for r in group["rules"]]
        return rules and all(rule["health"] != "unknown" for rule in rules) and rules

    rules = wait_until(evaluated, 15, "every rule has been evaluated")
    wrong = [(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] != "ok"]
    assert not wrong
    firing = [rule["name"] for rule in rules if rule.get("state") == "firing"]
    assert not firing or set(firing) == {"EpserveEpochsChurn"}, "after the tests of faults"


def test_alert_is_raised_while_experts_have_no_worker_and_taken_back_after(scraped):
    raised = 'ALERTS{alertname="EpserveNotServing"}'
    assert not scraped.query(raised)
    scraped.docker("stop", "worker-3")
    try:
        wait_until(lambda: scraped.query(raised), 25, "the alert is pending")
    finally:
        scraped.docker("start", "worker-3")
    wait_until(lambda: not scraped.query(raised), 25, "the alert is taken back")
