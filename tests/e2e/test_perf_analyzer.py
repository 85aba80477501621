"""NVIDIA's perf_analyzer, unmodified, drives the service. Its program is run itself, because the
wrapper that its package installs hides the exit code."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from cluster import SLOWNESS
from infer import random_batch

DIRECTORY = pathlib.Path(sys.prefix) / "perf_analyzer"
PROGRAM = DIRECTORY / "perf_analyzer"
TOKENS = 4


@pytest.fixture(scope="module")
def cluster(checkpoint, start_cluster):
    if not PROGRAM.exists():
        if os.environ.get("EPSERVE_REQUIRE_PYTHON"):
            pytest.fail(f"{PROGRAM} is missing; tests/run.sh fetches it")
        pytest.skip("perf_analyzer is not here; tests/run.sh fetches it")
    options = dict(coordinator_args=["--allow-client-shm"])
    with start_cluster(checkpoint(), workers=2, **options) as running:
        yield running


def analyze(cluster, *args):
    """Runs it for a moment, however unsteady the machine; returns the CompletedProcess."""
    command = [
        *(PROGRAM, "-m", cluster.checkpoint.name, "-u", cluster.target, "-i", "grpc"),
        *("--measurement-interval", 500, "-r", 3, "--stability-percentage", 999),
        *args,
    ]
    return subprocess.run(
        [str(word) for word in command],
        env={**os.environ, "LD_LIBRARY_PATH": str(DIRECTORY)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60 * SLOWNESS,
        check=False,
    )


@pytest.fixture
def input_data(cluster, rng, tmp_path):
    """A file with one valid request."""
    names = ("hidden_states", "topk_ids", "topk_weights")
    request = {
        name: {"content": array.reshape(-1).tolist(), "shape": list(array.shape)}
        for name, array in zip(names, random_batch(cluster.checkpoint.spec, rng, TOKENS))
    }
    path = tmp_path / "input.json"
    path.write_text(json.dumps({"data": [request]}))
    return path


@pytest.mark.parametrize(
    "mode",
    [[], ["--streaming", "--async"], ["--shared-memory", "system"], ["--concurrency-range", "8"]],
    ids=["unary", "streaming", "system-shm", "concurrency-8"],
)
def test_valid_requests_are_answered(cluster, input_data, mode):
    result = analyze(cluster, "--input-data", input_data, *mode)
    assert result.returncode == 0, result.stdout + result.stderr
    throughput = re.search(r"throughput: ([0-9.]+) infer/sec", result.stdout)
    assert throughput and float(throughput.group(1)) > 0, result.stdout
    # The server's own counts, which it reads before and after, agree with what it sent.
    assert re.search(r"Successful request count: [1-9]", result.stdout), result.stdout
    assert cluster.is_ready()


def test_its_own_random_bytes_get_a_clean_refusal_and_nothing_worse(cluster):
    spec = cluster.checkpoint.spec
    shapes = {"hidden_states": spec.hidden, "topk_ids": spec.topk, "topk_weights": spec.topk}
    words = [w for name, n in shapes.items() for w in ("--shape", f"{name}:{TOKENS},{n}")]
    result = analyze(cluster, *words)
    assert result.returncode != 0
    output = result.stdout + result.stderr
    assert re.search(r"topk_ids\[\d+,\d+\] is -?\d+, outside \[-1, \d+\)", output), output
    assert cluster.is_ready()
    assert all(worker.alive() for worker in cluster.workers.values())
