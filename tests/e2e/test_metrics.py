"""The Prometheus endpoint: what it offers, and that the numbers follow the requests."""

import grpc
import pytest

from cluster import wait_until
from infer import infer, random_batch

PHASES = ("queue", "assign", "counts", "dispatch", "ffn", "combine", "reply")


@pytest.fixture(scope="module")
def cluster(checkpoint, start_cluster):
    with start_cluster(checkpoint(), workers=2) as running:
        yield running


def test_every_metric_is_there_with_help_and_type(cluster, rng):
    infer(cluster, *random_batch(cluster.checkpoint.spec, rng, 4))
    text = cluster.metrics_text()
    for name, kind in {
        "epserve_requests_total": "counter",
        "epserve_queue_depth": "gauge",
        "epserve_tokens_total": "counter",
        "epserve_batches_total": "counter",
        "epserve_region_bytes_total": "counter",
        "epserve_phase_seconds": "histogram",
        "epserve_expert_rows_total": "counter",
        "epserve_epoch": "gauge",
        "epserve_workers": "gauge",
        "epserve_serving": "gauge",
        "epserve_refused_total": "counter",
        "epserve_batches_in_flight": "gauge",
        "epserve_heaps": "gauge",
        "epserve_output_bytes_total": "counter",
        "epserve_request_seconds": "histogram",
    }.items():
        assert f"# TYPE {name} {kind}" in text
        assert f"# HELP {name} " in text


def test_numbers_follow_the_requests(cluster, rng):
    spec = cluster.checkpoint.spec
    before = cluster.metrics()
    for _ in range(5):
        hidden, ids, weights = random_batch(spec, rng, 10)
        ids[:] = 3
        infer(cluster, hidden, ids, weights)
    with pytest.raises(grpc.RpcError):
        infer(cluster, hidden, ids + 100, weights)
    cluster.wait_status(lambda s: not s.batches_in_flight, 5, "no batch in flight")
    after = cluster.metrics()

    def grown(key):
        return after[key] - before.get(key, 0)

    assert grown('epserve_requests_total{outcome="ok"}') == 5
    assert grown('epserve_requests_total{outcome="invalid_argument"}') == 1
    assert grown("epserve_tokens_total") == 50
    assert grown('epserve_output_bytes_total{way="copied"}') == 50 * spec.hidden * 4
    assert grown('epserve_output_bytes_total{way="lent"}') == 0
    assert grown('epserve_expert_rows_total{expert="3"}') == 5 * 10 * spec.topk
    assert grown("epserve_request_seconds_count") >= 5
    for phase in PHASES:
        assert grown(f'epserve_phase_seconds_count{{phase="{phase}"}}') >= 5, phase
    # Phases are parts of a request, one after another or side by side on the two workers; counts
    # come with the shard here and take no time of their own.
    seconds = {phase: grown(f'epserve_phase_seconds_sum{{phase="{phase}"}}') for phase in PHASES}
    whole = grown("epserve_request_seconds_sum")
    assert all(0 < seconds[phase] for phase in PHASES if phase != "counts"), seconds
    assert all(taken <= 2 * whole for taken in seconds.values()), (seconds, whole)
    status = cluster.status()
    failed = {k: n for k, n in after.items() if k.startswith("epserve_requests_total{")}
    assert status.requests_ok == failed.pop('epserve_requests_total{outcome="ok"}')
    assert status.requests_failed == sum(failed.values()) > 0
    assert after["epserve_epoch"] == cluster.status().epoch
    assert after['epserve_workers{state="serving"}'] == 2
    assert after['epserve_heaps{handle_type="shm"}'] == 2
    assert after['epserve_heaps{handle_type="other"}'] == 0
    assert after["epserve_serving"] == 1
    assert after["epserve_queue_depth"] == 0
    assert after["epserve_batches_in_flight"] == 0


def test_large_outputs_are_lent_and_counted_so(cluster, rng):
    spec = cluster.checkpoint.spec
    ways = [f'epserve_output_bytes_total{{way="{way}"}}' for way in ("lent", "copied")]
    before = cluster.metrics()
    large = (1 << 20) // (4 * spec.hidden)
    for num_tokens in (large, large - 1):
        infer(cluster, *random_batch(spec, rng, num_tokens))
    after = cluster.metrics()
    assert after[ways[0]] - before[ways[0]] == 1 << 20
    assert after[ways[1]] - before[ways[1]] == (1 << 20) - 4 * spec.hidden


def test_heaps_count_no_more_once_their_epoch_has_ended(checkpoint, start_cluster):
    key = 'epserve_heaps{handle_type="shm"}'
    with start_cluster(checkpoint(), workers=2) as cluster:
        assert cluster.metrics()[key] == 2
        cluster.workers[1].kill()
        # The other worker lives on, but has closed its heap.
        wait_until(lambda: cluster.metrics()[key] == 0, 10, "both heaps are gone")
