"""Renders the Helm chart with Helm's own engine, and finds things in what comes out."""

import dataclasses
import functools
import pathlib
import re

import helm_python.chart
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHART_DIR = ROOT / "deploy" / "helm" / "epserve"
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yml"
DASHBOARD = ROOT / "deploy" / "grafana" / "epserve.json"
RELEASE = "demo"
NAMESPACE = "prod"
VALUE_SETS = sorted(p.name.removesuffix("-values.yaml") for p in (CHART_DIR / "ci").iterdir())


@functools.cache
def load():
    return helm_python.chart.Chart.load(CHART_DIR)


def values(name):
    return yaml.safe_load((CHART_DIR / "ci" / f"{name}-values.yaml").read_text())


def merged(base, changes):
    """`base` with `changes` laid over it, as `helm --set` does."""
    result = dict(base)
    for key, value in changes.items():
        known = result.get(key)
        both = isinstance(value, dict) and isinstance(known, dict)
        result[key] = merged(known, value) if both else value
    return result


@dataclasses.dataclass
class Rendered:
    objects: list
    notes: str

    def of(self, kind):
        return [each for each in self.objects if each["kind"] == kind]

    def one(self, kind, suffix=""):
        found = [o for o in self.of(kind) if o["metadata"]["name"].endswith(suffix)]
        assert len(found) == 1, f"{kind} *{suffix}: {[o['metadata']['name'] for o in found]}"
        return found[0]

    def coordinator(self):
        return self.one("Deployment")["spec"]["template"]

    def workers(self):
        """The template of the workers' pods."""
        if self.of("LeaderWorkerSet"):
            return self.one("LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]["workerTemplate"]
        return self.one("StatefulSet")["spec"]["template"]

    def verify(self):
        return self.one("Pod", "-verify")

    def pods(self):
        return {"coordinator": self.coordinator(), "worker": self.workers(), "test": self.verify()}


def render(changes, name=RELEASE):
    files = load().render(changes, name=name, namespace=NAMESPACE)
    objects, notes = [], ""
    for path, text in files.items():
        if path.endswith("NOTES.txt"):
            notes = text
        else:
            objects += [each for each in yaml.safe_load_all(text) if each]
    return Rendered(objects, notes)


def selects(selector, labels):
    return all(labels.get(key) == value for key, value in selector.items())


def flag(container, name):
    """The value of --name in a container's arguments; None where it is not there."""
    given = [a.partition("=")[2] for a in container["args"] if a.partition("=")[0] == name]
    assert len(given) <= 1, f"{name} is given {len(given)} times"
    return given[0] if given else None


def metrics():
    """name -> type of every metric that the coordinator registers, from its source."""
    source = (ROOT / "server" / "coordinator" / "metrics.cc").read_text()
    pattern = r"Build(Counter|Gauge|Histogram)\(\)\s*\.Name\(\"(epserve_[a-z_]+)\"\)"
    return {name: kind.lower() for kind, name in re.findall(pattern, source)}
