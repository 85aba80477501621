"""The operators' calls: status, placement, load per expert, draining a worker."""

import grpc
import numpy as np
import pytest

import protos
from checkpoints import relative_error
from infer import infer, random_batch

WORKERS = 3
EXPERTS = 10


@pytest.fixture(scope="module")
def cluster(checkpoint, start_cluster):
    with start_cluster(checkpoint(experts=EXPERTS, topk=3), workers=WORKERS) as running:
        yield running


def expert_load(cluster, layer=-1):
    request = protos.epserve.GetExpertLoadRequest(layer=layer)
    return np.array(cluster.admin.GetExpertLoad(request, timeout=5).rows, np.int64)


def test_status_describes_cluster_and_workers(cluster):
    status = cluster.status()
    assert status.cluster_id == cluster.id
    assert status.model == cluster.checkpoint.name
    assert status.state == "serving"
    assert status.epoch > 0
    assert status.expected_workers == WORKERS
    assert status.queue_capacity == 1024
    assert (status.num_experts, status.experts_without_worker) == (EXPERTS, 0)
    workers = sorted(status.workers, key=lambda worker: worker.rank)
    assert [worker.rank for worker in workers] == list(range(WORKERS))
    assert sorted(w.worker_id for w in workers) == [f"w{index}" for index in range(WORKERS)]
    assert {w.pid for w in workers} == {w.pid for w in cluster.workers.values()}
    spec = cluster.checkpoint.spec
    expert_bytes = 3 * spec.hidden * spec.intermediate * 4 * spec.num_moe_layers
    for worker in workers:
        assert worker.state == "serving"
        assert worker.load_fraction == 1
        assert worker.weight_bytes >= worker.num_experts * expert_bytes
        assert worker.heap_bytes > 0
        assert worker.backend == "host"
        assert worker.ms_since_heartbeat < 1000


def test_placement_covers_every_expert_once_and_evenly(cluster):
    placement = cluster.admin.GetPlacement(protos.epserve.GetPlacementRequest(), timeout=5)
    ranges = sorted(placement.ranges, key=lambda owned: owned.rank)
    assert [owned.rank for owned in ranges] == list(range(WORKERS))
    following = 0
    for owned in ranges:
        assert owned.first_expert == following
        assert owned.num_experts in (EXPERTS // WORKERS, EXPERTS // WORKERS + 1)
        assert owned.worker_id
        following += owned.num_experts
    assert following == EXPERTS


def test_load_counts_the_rows_of_each_expert_in_its_layer(cluster, rng):
    hidden, ids, weights = random_batch(cluster.checkpoint.spec, rng, 40)
    ids[::5, 0] = -1
    before = {layer: expert_load(cluster, layer) for layer in (-1, 0, 1)}
    for _ in range(3):
        infer(cluster, hidden, ids, weights, layer=1)
    cluster.wait_status(lambda s: not s.batches_in_flight, 5, "no batch in flight")
    rows = 3 * np.bincount(ids[ids >= 0], minlength=EXPERTS)
    assert np.array_equal(expert_load(cluster, 1) - before[1], rows)
    assert np.array_equal(expert_load(cluster, -1) - before[-1], rows)
    assert np.array_equal(expert_load(cluster, 0), before[0])


def test_load_counts_what_the_served_router_chose(cluster, rng):
    hidden = cluster.checkpoint.tokens_away_from_ties(rng, 40)
    before = expert_load(cluster)
    infer(cluster, hidden)
    cluster.wait_status(lambda s: not s.batches_in_flight, 5, "no batch in flight")
    ids, _, _ = cluster.checkpoint.route(hidden)
    rows = np.bincount(ids.ravel(), minlength=EXPERTS)
    assert np.array_equal(expert_load(cluster) - before, rows)


def test_load_of_an_unknown_layer_is_not_found(cluster):
    with pytest.raises(grpc.RpcError) as caught:
        expert_load(cluster, 77)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert "77" in caught.value.details()


def test_drain_of_an_unknown_worker_is_not_found_by_name(cluster):
    with pytest.raises(grpc.RpcError) as caught:
        request = protos.epserve.DrainWorkerRequest(worker_id="nobody")
        cluster.admin.DrainWorker(request, timeout=5)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert "nobody" in caught.value.details()


def test_drained_worker_exits_with_0_and_another_takes_its_place(cluster, rng):
    others = [cluster.workers[index].pid for index in (0, 2)]
    leaving = cluster.workers[1]
    request = protos.epserve.DrainWorkerRequest(worker_id="w1")
    cluster.admin.DrainWorker(request, timeout=20)
    assert leaving.wait() == 0
    assert not cluster.is_ready()
    batch = random_batch(cluster.checkpoint.spec, rng, 6)
    with pytest.raises(grpc.RpcError) as caught:
        infer(cluster, *batch)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "of 10 experts have no live worker" in caught.value.details()

    cluster.start_worker(1)
    cluster.wait_ready()
    assert relative_error(infer(cluster, *batch), cluster.checkpoint.ffn(*batch)) <= 1e-5
    assert [cluster.workers[index].pid for index in (0, 2)] == others
    assert all(cluster.workers[index].alive() for index in (0, 2))
