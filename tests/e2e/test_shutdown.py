"""SIGTERM: a coordinator drains, a worker leaves; neither harms what is under way."""

import collections
import signal
import threading
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import protos
from checkpoints import relative_error
from cluster import SLOWNESS, wait_until
from infer import Load, infer, make_request, output_of, random_batch

LEASE = ["--lease-ms", 4000]


def test_sigterm_of_coordinator_finishes_requests_and_takes_no_new_ones(
    checkpoint, start_cluster, rng
):
    served = checkpoint()
    with start_cluster(served, workers=2, coordinator_args=LEASE) as cluster:
        batches = [random_batch(served.spec, rng, 6) for _ in range(5)]
        requests = [make_request(served.name, *batch) for batch in batches]
        cluster.workers[0].pause()
        calls = [cluster.front_door.ModelInfer.future(r, timeout=20) for r in requests]
        cluster.wait_status(
            lambda s: (s.batches_in_flight, s.queued_requests) == (2, 3), 2, "all have arrived"
        )
        cluster.coordinator.send(signal.SIGTERM)
        health = health_pb2_grpc.HealthStub(cluster.channel)
        readiness = health_pb2.HealthCheckRequest(service="readiness")
        wait_until(
            lambda: health.Check(readiness, timeout=5).status
            == health_pb2.HealthCheckResponse.NOT_SERVING,
            2,
            "readiness is withdrawn",
        )
        with pytest.raises(grpc.RpcError) as caught:
            infer(cluster, *batches[0], timeout_s=5)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        cluster.workers[0].resume()
        for call, batch in zip(calls, batches):
            assert relative_error(output_of(call.result()), served.ffn(*batch)) <= 1e-5
        assert cluster.coordinator.wait() == 0
        assert all(worker.alive() for worker in cluster.workers.values())

        # The workers kept their weights: the next coordinator serves with them at once.
        cluster.start_coordinator()
        cluster.wait_ready()
        assert relative_error(infer(cluster, *batches[0]), served.ffn(*batches[0])) <= 1e-5


def test_sigterm_of_coordinator_does_not_wait_beyond_the_drain_timeout(
    checkpoint, start_cluster, rng
):
    served = checkpoint()
    arguments = [*LEASE, "--drain-timeout-ms", 300]
    with start_cluster(served, workers=2, coordinator_args=arguments) as cluster:
        cluster.workers[0].pause()
        request = make_request(served.name, *random_batch(served.spec, rng, 6))
        call = cluster.front_door.ModelInfer.future(request, timeout=20)
        cluster.wait_status(lambda s: s.batches_in_flight == 1, 2, "it is in flight")
        cluster.coordinator.send(signal.SIGTERM)
        assert call.exception(timeout=3).code() == grpc.StatusCode.UNAVAILABLE
        assert cluster.coordinator.wait(3) == 0
        cluster.workers[0].resume()


def test_calls_that_come_while_the_coordinator_ends_are_unavailable(checkpoint, start_cluster):
    """And never CANCELLED, which callers do not take for a reason to retry."""
    request = protos.inference.ServerLiveRequest()
    codes = collections.Counter()
    lock = threading.Lock()

    def call_until(stopped, target):
        options = [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.initial_reconnect_backoff_ms", 100),
        ]
        with grpc.insecure_channel(target, options) as channel:
            stub = protos.front_door(channel)
            while not stopped.is_set():
                try:
                    stub.ServerLive(request, timeout=20)
                    code = "OK"
                except grpc.RpcError as error:
                    code = error.code().name
                with lock:
                    codes[code] += 1

    with start_cluster(checkpoint(), workers=1, start=False) as cluster:
        for _ in range(5):
            cluster.start_coordinator()
            before = codes["OK"]
            stopped = threading.Event()
            callers = [
                threading.Thread(target=call_until, args=(stopped, cluster.target))
                for _ in range(8)
            ]
            for caller in callers:
                caller.start()
            wait_until(lambda: codes["OK"] > before + 50, 20, "calls are answered")
            assert cluster.coordinator.terminate() == 0
            stopped.set()
            for caller in callers:
                caller.join()
    assert codes["UNAVAILABLE"] > 0
    assert set(codes) == {"OK", "UNAVAILABLE"}, codes


def test_sigterm_of_worker_under_load_exits_with_0_and_wrongs_no_request(
    checkpoint, start_cluster, rng
):
    served = checkpoint()
    with start_cluster(served, workers=3) as cluster:
        batch = random_batch(served.spec, rng, 16)
        with Load(cluster, batch, served.ffn(*batch)) as load:
            wait_until(lambda: load.count() > 20, 10, "requests are served")
            assert cluster.workers[2].terminate() == 0
            cluster.start_worker(2)
            cluster.wait_ready()
            before = load.count()
            wait_until(lambda: load.count() > before + 20, 10, "requests are served again")
        assert {call[2] for call in load.calls} <= {"OK", "UNAVAILABLE"}, load.calls
        assert all(cluster.workers[index].alive() for index in (0, 1))


def test_sigterm_of_worker_without_coordinator_exits_with_0(checkpoint, start_cluster):
    with start_cluster(checkpoint(), workers=2) as cluster:
        cluster.coordinator.kill()
        for worker in cluster.workers.values():
            assert worker.terminate(5) == 0


def test_ordinary_stop_warns_nobody(checkpoint, start_cluster):
    with start_cluster(checkpoint(), workers=2) as cluster:
        assert cluster.workers[0].terminate() == 0
        assert cluster.coordinator.terminate() == 0
        assert cluster.workers[1].terminate() == 0
        for program in (cluster.coordinator, *cluster.workers.values()):
            loud = [w for w in program.log().splitlines() if " WARNING " in w or " ERROR " in w]
            assert not loud, loud


@pytest.mark.parametrize("leave_ms", [0, 700])
def test_worker_told_to_go_waits_for_a_silent_coordinator_for_the_leave_timeout(
    checkpoint, start_cluster, leave_ms
):
    served = checkpoint()
    flags = dict(coordinator_args=LEASE, worker_args=["--leave-timeout-ms", leave_ms])
    with start_cluster(served, workers=2, **flags) as cluster:
        cluster.coordinator.pause()
        try:
            began = time.monotonic()
            assert cluster.workers[0].terminate(10) == 0
            took = time.monotonic() - began
        finally:
            cluster.coordinator.resume()
        assert leave_ms / 1000 <= took < leave_ms / 1000 + 5 * SLOWNESS
        assert "leave_timed_out" in cluster.workers[0].log()
        pid = cluster.start_worker(0).pid
        cluster.wait_status(
            lambda s: s.state == "serving" and pid in [w.pid for w in s.workers],
            20,
            "it serves again",
        )
