"""Fixtures of the black-box tests: checkpoints, clusters, and a look for leftovers after each."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))

import numpy as np
import pytest

import checkpoints
import cluster as clusters


def pytest_report_header():
    return f"epserve binaries: {clusters.BIN_DIR}"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A failed test shows the logs of the clusters that were up."""
    report = (yield).get_result()
    if report.failed:
        for cluster in clusters.live_clusters:
            report.sections.append((f"cluster {cluster.id}", cluster.logs()))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Writes checkpoints, each spec once: checkpoint(layout=..., dtype=..., ...)."""
    written = {}

    def make(**fields):
        spec = checkpoints.Spec(**fields)
        if spec not in written:
            name = f"{spec.layout}-{spec.dtype}-{len(written)}"
            directory = tmp_path_factory.mktemp("checkpoints") / name
            written[spec] = checkpoints.write(directory, spec)
        return written[spec]

    return make


@pytest.fixture(scope="module")
def start_cluster(tmp_path_factory):
    """start_cluster(checkpoint, workers=4, ...) -> Cluster, to be used in a with statement."""

    def start(checkpoint, **options):
        return clusters.Cluster(tmp_path_factory.mktemp("cluster"), checkpoint, **options)

    return start


@pytest.fixture
def rng(request):
    """Fresh random numbers, the same at every run of one test."""
    return np.random.default_rng(list(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def nothing_is_left():
    """After each test, what runs and what lies in /dev/shm belongs to a cluster still in use."""
    yield
    expected = {p.pid for c in clusters.live_clusters for p in c.programs}
    strays = [
        pid for pid in clusters.processes_mentioning(clusters.SESSION) if pid not in expected
    ]
    assert not strays, f"processes left: {strays}"
    known = tuple(f"epserve-{c.id}" for c in clusters.live_clusters)
    found = clusters.segments(clusters.SESSION)
    left = [name for name in found if not (known and name.startswith(known))]
    assert not left, f"segments left in /dev/shm: {left}"
