"""The ways to a batch's count matrix: one answer bit by bit whichever is taken, told by the trace
and the metrics; and what a peer that is lost in the exchange costs."""

import contextlib
import json
import signal
import time

import grpc
import numpy as np
import pytest

from checkpoints import relative_error
from cluster import SLOWNESS, wait_until
from infer import BF16, TOLERANCE, Load, infer, make_request, output_of, random_batch

# By --count-exchange: how batches are counted whose ids the coordinator sees, and others.
KINDS = {
    "coordinator": ("coordinator", "streams"),
    "device": ("device", "device"),
    "auto": ("coordinator", "device"),
}
# Up to so many rows that the workers route lie on one rank, whose counts go with its peers' shards
# wherever the coordinator may gather them.
FEW = 4
WORKERS = 3


def kind_unseen(mode, num_tokens):
    return "streams" if mode == "auto" and num_tokens <= FEW else KINDS[mode][1]


@pytest.fixture(scope="module")
def served(checkpoint):
    return checkpoint(experts=10, topk=3)


@pytest.fixture(scope="module")
def clusters(served, start_cluster):
    """One cluster for each setting, on the same checkpoint."""
    with contextlib.ExitStack() as stack:
        yield {
            mode: stack.enter_context(
                start_cluster(
                    served, workers=WORKERS, coordinator_args=["--count-exchange", mode]
                )
            )
            for mode in KINDS
        }


def traced(cluster, *tensors):
    """(output, trace) of one request."""
    request = make_request(cluster.checkpoint.name, *tensors)
    request.parameters["epserve_trace"].bool_param = True
    response = cluster.front_door.ModelInfer(request, timeout=30)
    return output_of(response), json.loads(response.parameters["epserve_trace"].string_param)


def check_trace(trace, kind, few=False):
    assert trace["count_exchange"] == kind
    of_workers = [worker["counts_ns"] for worker in trace["workers"]]
    # Those without rows take no part where the coordinator knows.
    assert len(of_workers) <= WORKERS
    if kind == "coordinator":  # It took the coordinator's time, and none of theirs.
        assert set(of_workers) == {0}
        assert trace["counts_ns"] > 0
    elif kind == "streams" and few:  # Their single source alone waited for it.
        assert len(of_workers) - of_workers.count(0) == 1
        assert trace["counts_ns"] == max(of_workers)
    else:
        assert len(of_workers) == WORKERS
        assert min(of_workers) > 0
        assert trace["counts_ns"] == max(of_workers)


def given_batches(spec, rng):
    """Batches with ids: of every size, skewed, with rows that name nobody, of every type."""
    for num_tokens in (1, 2, 5, 64, 67, 301):
        yield random_batch(spec, rng, num_tokens)
    yield random_batch(spec, rng, 97, BF16)
    for expert in (0, spec.experts - 1, -1):
        hidden, ids, weights = random_batch(spec, rng, 112)
        ids[:] = expert
        yield hidden, ids, weights
    hidden, ids, weights = random_batch(spec, rng, 120)
    ids[:40] = -1  # A shard that sends nothing.
    ids[60::2, 1:] = -1
    yield hidden, ids, weights


def test_every_way_gives_the_same_bits_and_the_trace_says_which_was_taken(clusters, served, rng):
    for hidden, ids, weights in given_batches(served.spec, rng):
        outputs = {}
        for mode, cluster in clusters.items():
            output, trace = traced(cluster, hidden, ids, weights)
            check_trace(trace, KINDS[mode][0])
            outputs[mode] = output.tobytes()
        assert len(set(outputs.values())) == 1, outputs.keys()
        want = served.ffn(hidden, ids, weights)
        assert np.linalg.norm(output.astype(np.float64) - want) <= (
            TOLERANCE[hidden.dtype] * np.linalg.norm(want)
        )


def test_what_the_workers_route_is_counted_alike_by_every_way(clusters, served, rng):
    for num_tokens in (1, 2, 4, 5, 7, 64, 200):
        hidden = served.tokens_away_from_ties(rng, num_tokens)
        outputs = set()
        for mode, cluster in clusters.items():
            output, trace = traced(cluster, hidden)
            check_trace(trace, kind_unseen(mode, num_tokens), few=num_tokens <= FEW)
            outputs.add(output.tobytes())
        assert len(outputs) == 1
        assert relative_error(output, served.served(hidden)) <= 1e-5


def test_metrics_count_batches_by_the_way_taken(clusters, served, rng):
    given = random_batch(served.spec, rng, 8)
    routed = served.tokens_away_from_ties(rng, 8)

    def batches(cluster):
        # A batch is counted right after its requests are answered.
        cluster.wait_status(lambda s: not s.batches_in_flight, 5, "no batch in flight")
        metrics = cluster.metrics()
        kinds = ("coordinator", "streams", "device")
        return {k: metrics[f'epserve_batches_total{{count_exchange="{k}"}}'] for k in kinds}

    for mode, cluster in clusters.items():
        before = batches(cluster)
        for _ in range(3):
            infer(cluster, *given)
        for _ in range(2):
            infer(cluster, routed)
        grown = {kind: 0 for kind in before}
        grown[KINDS[mode][0]] += 3
        grown[kind_unseen(mode, len(routed))] += 2
        wait_until(
            lambda: {k: n - before[k] for k, n in batches(cluster).items()} == grown,
            5,
            f"{mode} counts {grown}",
        )


def test_two_slots_under_load_stay_right_and_apart(clusters, served, rng):
    batches = [random_batch(served.spec, rng, size) for size in (96, 5)]
    cluster = clusters["device"]
    with contextlib.ExitStack() as stack:
        loads = [
            stack.enter_context(Load(cluster, batch, served.ffn(*batch), concurrency=3))
            for batch in batches
        ]
        wait_until(lambda: all(load.count() > 100 for load in loads), 60, "both are served")
    assert {call[2] for load in loads for call in load.calls} == {"OK"}


def begin(cluster, *batch):
    """Sends a request that cannot end yet, and returns it once it is with the workers."""
    call = cluster.front_door.ModelInfer.future(
        make_request(cluster.checkpoint.name, *batch), timeout=60
    )
    cluster.wait_status(lambda s: s.batches_in_flight == 1, 5, "the batch is in flight")
    return call


def test_peer_killed_during_the_exchange_costs_unavailable_in_bounded_time(
    served, start_cluster, rng
):
    # A lease that is longer than the test waits: only the kill can end the batch.
    options = dict(coordinator_args=["--count-exchange=device", "--lease-ms=5000"])
    with start_cluster(served, workers=WORKERS, **options) as cluster:
        batch = random_batch(served.spec, rng, 130)
        bits = infer(cluster, *batch).tobytes()
        cluster.workers[1].pause()  # It tells its peers nothing any more.
        call = begin(cluster, *batch)
        killed_at = time.monotonic()
        cluster.workers[1].kill()
        assert call.exception(timeout=20).code() == grpc.StatusCode.UNAVAILABLE
        assert time.monotonic() - killed_at <= 2 * SLOWNESS
        for index in (0, 2):
            assert cluster.workers[index].alive()
        cluster.start_worker(1)
        cluster.wait_ready()
        assert infer(cluster, *batch).tobytes() == bits


def test_peer_that_is_silent_in_the_exchange_is_named_after_the_peer_timeout(
    served, start_cluster, rng
):
    options = dict(
        coordinator_args=["--count-exchange=device", "--lease-ms=5000"],
        worker_args=["--peer-timeout-ms=300"],
    )
    with start_cluster(served, workers=WORKERS, **options) as cluster:
        batch = random_batch(served.spec, rng, 130)
        bits = infer(cluster, *batch).tobytes()
        cluster.workers[1].pause()
        call = begin(cluster, *batch)
        error = call.exception(timeout=20)
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert "counts: rank " in error.details()
        assert "ms for rank " in error.details()
        assert "exceeds peer_timeout 300 ms" in error.details()
        cluster.workers[1].send(signal.SIGCONT)
        cluster.wait_ready()
        assert infer(cluster, *batch).tobytes() == bits
