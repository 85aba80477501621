"""What is killed, cut off or paused, costs no more than it must, and comes back."""

import contextlib
import resource
import signal
import socket
import time

import grpc
import numpy as np
import pytest

from checkpoints import relative_error
from cluster import SLOWNESS, wait_until
from infer import Load, infer, make_request, output_of, random_batch

# A worker's log has this event once for each time that it read weights.
LOADED = "weights_loaded"


def times_loaded(worker):
    return worker.log().count(LOADED)


def ends_within(load, since, limit_s):
    """Every call that was under way at `since` ended within the limit."""
    late = [call for call in load.calls if call[0] <= since < call[1] - limit_s * SLOWNESS]
    assert not late, f"ended too late: {late}"


def test_killed_worker_under_load_costs_unavailable_and_restarts_nobody_else(
    checkpoint, start_cluster, rng
):
    served = checkpoint(experts=16, topk=4)
    with start_cluster(served, workers=4) as cluster:
        batch = random_batch(served.spec, rng, 32)
        epoch = cluster.status().epoch
        with Load(cluster, batch, served.ffn(*batch), concurrency=6) as load:
            wait_until(lambda: load.count() > 30, 20, "requests are served")
            killed_at = time.monotonic()
            cluster.workers[2].kill()
            wait_until(lambda: load.count("UNAVAILABLE") >= 6, 2, "all hear UNAVAILABLE")
            with pytest.raises(grpc.RpcError) as caught:
                infer(cluster, *batch)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            assert "4 of 16 experts have no live worker" in caught.value.details()
            assert cluster.status().experts_without_worker == 4
            cluster.start_worker(2)
            cluster.wait_ready(10)
            before = load.count()
            wait_until(lambda: load.count() > before + 30, 20, "requests are served again")
        ends_within(load, killed_at, 2)
        assert {call[2] for call in load.calls} == {"OK", "UNAVAILABLE"}
        assert cluster.status().epoch > epoch
        for index in (0, 1, 3):
            assert cluster.workers[index].alive()
            assert times_loaded(cluster.workers[index]) == 1


def test_worker_killed_again_and_again_is_taken_back_each_time(checkpoint, start_cluster, rng):
    served = checkpoint()
    with start_cluster(served, workers=3) as cluster:
        batch = random_batch(served.spec, rng, 32)
        epochs = [cluster.status().epoch]
        for victim in (0, 1, 2):
            cluster.workers[victim].kill()
            cluster.start_worker(victim)
            cluster.wait_status(
                lambda s: s.state == "serving" and s.epoch > epochs[-1], 10, "a new epoch serves"
            )
            epochs.append(cluster.status().epoch)
            assert relative_error(infer(cluster, *batch), served.ffn(*batch)) <= 1e-5


def test_no_lease_is_waited_for_where_nobody_can_hold_one(checkpoint, start_cluster, rng):
    """At a first start no epoch was before; and a process that is seen to end touches nothing."""
    served = checkpoint()
    batch = random_batch(served.spec, rng, 32)
    started_at = time.monotonic()
    with start_cluster(
        served, workers=2, coordinator_args=["--lease-ms", 60_000]
    ) as cluster:
        print(f"first served {time.monotonic() - started_at:.2f} s after the start")
        assert time.monotonic() - started_at < 20 * SLOWNESS
        for victim in (0, 1):
            epoch = cluster.status().epoch
            killed_at = time.monotonic()
            cluster.workers[victim].kill()
            cluster.start_worker(victim)
            cluster.wait_status(
                lambda s: s.state == "serving" and s.epoch > epoch, 20, "a new epoch serves"
            )
            print(f"served again {time.monotonic() - killed_at:.2f} s after the kill")
            assert relative_error(infer(cluster, *batch), served.ffn(*batch)) <= 1e-5


def test_killed_coordinator_under_load_comes_back_to_workers_that_kept_their_weights(
    checkpoint, start_cluster, rng
):
    served = checkpoint(experts=16, topk=4)
    with start_cluster(served, workers=4) as cluster:
        batch = random_batch(served.spec, rng, 32)
        epoch = cluster.status().epoch
        pids = {worker.pid for worker in cluster.workers.values()}
        with Load(cluster, batch, served.ffn(*batch)) as load:
            wait_until(lambda: load.count() > 30, 20, "requests are served")
            killed_at = time.monotonic()
            cluster.coordinator.kill()
            wait_until(lambda: load.count("UNAVAILABLE") >= 4, 2, "all hear UNAVAILABLE")
            cluster.start_coordinator()
            restarted_at = time.monotonic()
            before = load.count()
            wait_until(lambda: load.count() > before, 2, "it serves within 2 s of its restart")
            print(f"served {time.monotonic() - restarted_at:.2f} s after the restart")
            wait_until(lambda: load.count() > before + 30, 20, "requests are served again")
        ends_within(load, killed_at, 2)
        assert {call[2] for call in load.calls} == {"OK", "UNAVAILABLE"}
        status = cluster.status()
        assert status.epoch > epoch
        assert {worker.pid for worker in status.workers} == pids
        assert all(times_loaded(worker) == 1 for worker in cluster.workers.values())


def test_coordinator_killed_and_back_many_times_only_grows_its_epochs(
    checkpoint, start_cluster, rng
):
    served = checkpoint()
    with start_cluster(served, workers=2) as cluster:
        batch = random_batch(served.spec, rng, 8)
        epochs = [cluster.status().epoch]
        for _ in range(4):
            cluster.coordinator.kill()
            cluster.start_coordinator()
            cluster.wait_ready(5)
            epochs.append(cluster.status().epoch)
            assert relative_error(infer(cluster, *batch), served.ffn(*batch)) <= 1e-5
        assert epochs == sorted(set(epochs))
        assert all(times_loaded(worker) == 1 for worker in cluster.workers.values())


def test_worker_paused_past_its_lease_changes_nothing_when_it_wakes(
    checkpoint, start_cluster, rng
):
    served = checkpoint(experts=8, topk=3)
    with start_cluster(served, workers=2) as cluster:
        cluster.start_worker(2)
        cluster.wait_status(
            lambda s: "standby" in [w.state for w in s.workers], 5, "the third stands by"
        )
        batch = random_batch(served.spec, rng, 64)
        first_epoch = cluster.status().epoch
        bits = infer(cluster, *batch).tobytes()
        request = make_request(served.name, *batch)
        with Load(cluster, batch, served.ffn(*batch), concurrency=3) as load:
            wait_until(lambda: load.count() > 20, 20, "requests are served")
            paused_at = time.monotonic()
            cluster.workers[0].pause()
            cluster.wait_status(
                lambda s: s.state == "serving" and s.epoch > first_epoch, 10, "a new epoch serves"
            )
            before = load.count()
            wait_until(lambda: load.count() > before + 20, 20, "the standby's epoch serves")
            second_epoch = cluster.status().epoch
            cluster.workers[0].resume()
            # While it wakes, and after, every answer stays what it was, bit by bit.
            until = time.monotonic() + 2
            while time.monotonic() < until:
                response = cluster.front_door.ModelInfer(request, timeout=20)
                assert output_of(response).tobytes() == bits
            cluster.wait_status(
                lambda s: {w.worker_id: w.state for w in s.workers}.get("w0") == "standby",
                10,
                "the paused one is back as standby",
            )
        ends_within(load, paused_at, 2)
        assert {call[2] for call in load.calls} == {"OK", "UNAVAILABLE"}
        # Nothing that the woken one said ended the epoch that went on without it.
        assert cluster.status().epoch == second_epoch
        assert all(worker.alive() for worker in cluster.workers.values())

        # And it is of use: when another dies, it takes over.
        cluster.workers[1].kill()
        cluster.wait_status(
            lambda s: s.state == "serving" and s.epoch > second_epoch, 10, "it has taken over"
        )
        assert relative_error(infer(cluster, *batch), served.ffn(*batch)) <= 1e-5


def test_worker_paused_past_its_lease_without_a_replacement_comes_back(
    checkpoint, start_cluster, rng
):
    served = checkpoint()
    with start_cluster(served, workers=2) as cluster:
        batch = random_batch(served.spec, rng, 16)
        bits = infer(cluster, *batch).tobytes()
        cluster.workers[1].pause()
        cluster.wait_not_ready()
        cluster.workers[1].resume()
        cluster.wait_ready()
        assert infer(cluster, *batch).tobytes() == bits
        assert all(times_loaded(worker) == 1 for worker in cluster.workers.values())


def test_all_workers_killed_at_once_come_back(checkpoint, start_cluster, rng):
    served = checkpoint()
    with start_cluster(served, workers=3) as cluster:
        for worker in cluster.workers.values():
            worker.send(signal.SIGKILL)
        for worker in cluster.workers.values():
            worker.wait()
        cluster.wait_not_ready()
        for index in range(3):
            cluster.start_worker(index)
        cluster.wait_ready()
        batch = random_batch(served.spec, rng, 16)
        assert np.isfinite(infer(cluster, *batch)).all()
        assert relative_error(infer(cluster, *batch), served.ffn(*batch)) <= 1e-5


def test_load_with_unlike_batches_in_flight_stays_right_through_a_kill(
    checkpoint, start_cluster, rng
):
    """Slots that held a dead epoch's batch never leak into the next epoch's answers."""
    served = checkpoint(experts=8, topk=3)
    with start_cluster(served, workers=3) as cluster:
        batches = [random_batch(served.spec, rng, size) for size in (200, 3, 77)]
        loads = [Load(cluster, batch, served.ffn(*batch), concurrency=2) for batch in batches]
        for load in loads:
            load.__enter__()
        try:
            for victim in (1, 0):
                targets = [load.count() + 10 for load in loads]
                wait_until(
                    lambda: all(load.count() > t for load, t in zip(loads, targets)),
                    20,
                    "all kinds are served",
                )
                cluster.workers[victim].kill()
                cluster.start_worker(victim)
                cluster.wait_ready()
            targets = [load.count() + 10 for load in loads]
            wait_until(
                lambda: all(load.count() > t for load, t in zip(loads, targets)),
                20,
                "all kinds are served to the end",
            )
        finally:
            for load in loads:
                load.stop()
        outcomes = {call[2] for load in loads for call in load.calls}
        assert outcomes <= {"OK", "UNAVAILABLE"}


def test_coordinator_without_free_descriptors_ends_so_that_another_can_be_reached(
    checkpoint, start_cluster, rng
):
    served = checkpoint()
    with start_cluster(served, workers=2) as cluster:
        batch = random_batch(served.spec, rng, 8)
        want = served.ffn(*batch)
        first = cluster.coordinator
        soft, hard = resource.prlimit(first.pid, resource.RLIMIT_NOFILE)
        assert soft == hard  # It has taken what it may.
        resource.prlimit(first.pid, resource.RLIMIT_NOFILE, (200, 200))
        with contextlib.ExitStack() as connections:
            for _ in range(200):
                connections.enter_context(socket.create_connection(("127.0.0.1", cluster.port)))
            assert first.wait(20) == 1
        assert "listener_lost" in first.log()
        assert "raise the hard limit" in first.log()
        cluster.start_coordinator()
        cluster.wait_ready(10)
        assert relative_error(infer(cluster, *batch), want) <= 1e-5
        for worker in cluster.workers.values():
            assert times_loaded(worker) == 1
