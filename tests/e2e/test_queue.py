"""The bounded queue: what is turned away, and what leaves it early."""

import json

import grpc
import numpy as np
import pytest

import protos
from checkpoints import relative_error
from infer import make_request, output_of, random_batch

CAPACITY = 4
SLOTS = 2
# Long enough for a worker to be held still within it, while the queue behind it fills.
LEASE_MS = 6000


@pytest.fixture(scope="module")
def cluster(checkpoint, start_cluster):
    arguments = ["--queue-capacity", CAPACITY, "--slots", SLOTS, "--lease-ms", LEASE_MS]
    options = dict(coordinator_args=arguments, worker_args=["--slots", SLOTS])
    with start_cluster(checkpoint(), workers=2, **options) as running:
        yield running


class Held:
    """While it lasts, one worker stands still, so that batches in flight stay in flight."""

    def __init__(self, cluster):
        self._cluster = cluster

    def __enter__(self):
        self._cluster.workers[1].pause()
        return self

    def __exit__(self, *_):
        self._cluster.workers[1].resume()


def send(cluster, batch, timeout_s=30, front_door=None):
    request = make_request(cluster.checkpoint.name, *batch)
    request.parameters["epserve_trace"].bool_param = True
    return (front_door or cluster.front_door).ModelInfer.future(request, timeout=timeout_s)


def started_us(call):
    """When the request's batch went to the workers: the order of service, whoever hears of it."""
    return json.loads(call.result().parameters["epserve_trace"].string_param)["started_us"]


def fill_slots(cluster, batches):
    calls = [send(cluster, batch) for batch in batches[:SLOTS]]
    cluster.wait_status(lambda s: s.batches_in_flight == SLOTS, 2, "every slot is taken")
    return calls


def wait_queued(cluster, count):
    cluster.wait_status(lambda s: s.queued_requests == count, 2, f"{count} requests are queued")


def expert_rows(cluster):
    return sum(worker.expert_rows for worker in cluster.status().workers)


def tokens_total(cluster):
    return cluster.metrics()["epserve_tokens_total"]


def check(cluster, calls, batches):
    for call, batch in zip(calls, batches):
        want = cluster.checkpoint.ffn(*batch)
        assert relative_error(output_of(call.result()), want) <= 1e-5


def batches_of(cluster, rng, count):
    return [random_batch(cluster.checkpoint.spec, rng, 8) for _ in range(count)]


def test_request_to_a_full_queue_is_exhausted_with_a_pushback(cluster, rng):
    batches = batches_of(cluster, rng, SLOTS + CAPACITY)
    with Held(cluster):
        calls = fill_slots(cluster, batches)
        calls += [send(cluster, batch) for batch in batches[SLOTS:]]
        wait_queued(cluster, CAPACITY)
        refused = send(cluster, batches[0])
        error = refused.exception(timeout=5)
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert str(CAPACITY) in error.details()
        trailing = dict(refused.trailing_metadata())
        assert int(trailing["grpc-retry-pushback-ms"]) > 0
    check(cluster, calls, batches)
    metrics = cluster.metrics()
    assert metrics['epserve_requests_total{outcome="resource_exhausted"}'] >= 1


def test_deadline_of_a_queued_request_frees_its_place_and_starts_no_work(cluster, rng):
    batches = batches_of(cluster, rng, SLOTS + 1)
    rows_before, tokens_before = expert_rows(cluster), tokens_total(cluster)
    with Held(cluster):
        calls = fill_slots(cluster, batches)
        late = [send(cluster, batches[SLOTS], timeout_s=0.3) for _ in range(CAPACITY)]
        for call in late:
            assert call.exception(timeout=5).code() == grpc.StatusCode.DEADLINE_EXCEEDED
        wait_queued(cluster, 0)
    check(cluster, calls, batches)
    cluster.wait_status(lambda s: not s.batches_in_flight, 5, "no batch in flight")
    served = np.concatenate([batch[1] for batch in batches[:SLOTS]])
    assert expert_rows(cluster) - rows_before == (served >= 0).sum()
    assert tokens_total(cluster) - tokens_before == len(served)


def test_cancelled_queued_request_frees_its_place_and_starts_no_work(cluster, rng):
    batches = batches_of(cluster, rng, SLOTS + 1)
    rows_before = expert_rows(cluster)
    with Held(cluster):
        calls = fill_slots(cluster, batches)
        dropped = [send(cluster, batches[SLOTS]) for _ in range(CAPACITY)]
        wait_queued(cluster, CAPACITY)
        for call in dropped:
            call.cancel()
        wait_queued(cluster, 0)
    check(cluster, calls, batches)
    cluster.wait_status(lambda s: not s.batches_in_flight, 5, "no batch in flight")
    served = np.concatenate([batch[1] for batch in batches[:SLOTS]])
    assert expert_rows(cluster) - rows_before == (served >= 0).sum()
    assert cluster.metrics()['epserve_requests_total{outcome="cancelled"}'] >= CAPACITY


def test_request_in_flight_is_answered_at_its_deadline_and_its_batch_harms_none(cluster, rng):
    batches = batches_of(cluster, rng, 3)
    with Held(cluster):
        late = send(cluster, batches[0], timeout_s=0.3)
        cancelled = send(cluster, batches[1])
        cluster.wait_status(lambda s: s.batches_in_flight == 2, 2, "both are in flight")
        cancelled.cancel()
        assert late.exception(timeout=5).code() == grpc.StatusCode.DEADLINE_EXCEEDED
    check(cluster, [send(cluster, batches[2])], batches[2:])
    cluster.wait_status(lambda s: not s.batches_in_flight, 5, "no batch in flight")


def test_caller_who_fills_the_queue_yields_to_another_connection(cluster, rng):
    batches = batches_of(cluster, rng, SLOTS + CAPACITY + 1)
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(cluster.target, options) as channel:
        with Held(cluster):
            calls = fill_slots(cluster, batches)
            for index, batch in enumerate(batches[SLOTS:-1]):
                calls.append(send(cluster, batch))
                wait_queued(cluster, index + 1)
            other = send(cluster, batches[-1], front_door=protos.front_door(channel))
            error = calls[-1].exception(timeout=5)
            assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "of this connection" in error.details()
            assert int(dict(calls[-1].trailing_metadata())["grpc-retry-pushback-ms"]) > 0
            calls[-1:] = [other]
        check(cluster, calls, [*batches[: SLOTS + CAPACITY - 1], batches[-1]])
        # Callers take turns: behind one of those that were queued before it, at most.
        earlier = [call for call in calls[SLOTS:-1] if started_us(call) < started_us(other)]
        assert len(earlier) <= 1


def test_queued_requests_are_served_in_order_of_arrival(cluster, rng):
    batches = batches_of(cluster, rng, SLOTS + CAPACITY)
    with Held(cluster):
        calls = fill_slots(cluster, batches)
        for index, batch in enumerate(batches[SLOTS:]):
            calls.append(send(cluster, batch))
            wait_queued(cluster, index + 1)
    check(cluster, calls, batches)
    starts = [started_us(call) for call in calls[SLOTS:]]
    assert starts == sorted(starts)
