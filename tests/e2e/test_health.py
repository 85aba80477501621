"""The health service, reflection and channelz, and what the service says before it is ready."""

import threading

import grpc
import pytest
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import protos
from checkpoints import relative_error
from cluster import wait_until
from infer import infer, random_batch

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture(scope="module")
def cluster(checkpoint, start_cluster):
    with start_cluster(checkpoint(), workers=2) as running:
        yield running


def check(cluster, service):
    stub = health_pb2_grpc.HealthStub(cluster.channel)
    return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5).status


@pytest.mark.parametrize("service", ["", "liveness", "readiness"])
def test_health_of_a_ready_service_is_serving(cluster, service):
    assert check(cluster, service) == SERVING


def test_health_of_an_unknown_service_is_not_found(cluster):
    with pytest.raises(grpc.RpcError) as caught:
        check(cluster, "no-such-service")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_reflection_lists_every_service(cluster):
    stub = reflection_pb2_grpc.ServerReflectionStub(cluster.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (reply,) = stub.ServerReflectionInfo(iter([request]), timeout=5)
    names = {service.name for service in reply.list_services_response.service}
    assert names >= {
        "inference.GRPCInferenceService",
        "epserve.v1.Admin",
        "epserve.v1.Control",
        "grpc.health.v1.Health",
    }


def test_channelz_answers_with_the_server(cluster):
    stub = channelz_pb2_grpc.ChannelzStub(cluster.channel)
    reply = stub.GetServers(channelz_pb2.GetServersRequest(), timeout=5)
    assert sum(server.data.calls_started for server in reply.server) > 0


def test_service_without_enough_workers_is_live_not_ready_and_says_why(
    checkpoint, start_cluster, rng
):
    served = checkpoint(experts=10, topk=3)
    with start_cluster(served, workers=3, start=False) as cluster:
        cluster.start_coordinator()
        batch = random_batch(served.spec, rng, 3)

        def refusal():
            with pytest.raises(grpc.RpcError) as caught:
                infer(cluster, *batch)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            return caught.value.details()

        assert "10 of 10 experts have no live worker (0 of 3 workers joined)" in refusal()
        assert check(cluster, "liveness") == SERVING
        assert check(cluster, "readiness") == NOT_SERVING
        assert check(cluster, "") == NOT_SERVING
        assert cluster.metrics()["epserve_serving"] == 0
        ready = protos.inference.ModelReadyRequest(name=served.name)
        assert not cluster.front_door.ModelReady(ready, timeout=5).ready
        live = protos.inference.ServerLiveRequest()
        assert cluster.front_door.ServerLive(live, timeout=5).live

        seen = []
        stub = health_pb2_grpc.HealthStub(cluster.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="readiness"))

        def follow():
            try:
                for reply in watch:
                    seen.append(reply.status)
            except grpc.RpcError:
                pass  # The cancellation below.

        watcher = threading.Thread(target=follow)
        watcher.start()
        try:
            cluster.start_worker(0)
            cluster.start_worker(1)
            cluster.wait_status(
                lambda s: [w.state for w in s.workers].count("loaded") == 2, 10, "two have loaded"
            )
            assert "(2 of 3 workers joined)" in refusal()
            assert seen == [NOT_SERVING]
            cluster.start_worker(2)
            cluster.wait_ready()
            wait_until(lambda: seen == [NOT_SERVING, SERVING], 5, "the watch sees it ready")
            assert cluster.metrics()["epserve_serving"] == 1
            assert relative_error(infer(cluster, *batch), served.ffn(*batch)) <= 1e-5

            cluster.workers[1].kill()
            wait_until(lambda: seen[2:] == [NOT_SERVING], 5, "the watch sees the loss")
            assert cluster.metrics()["epserve_serving"] == 0
        finally:
            watch.cancel()
            watcher.join()
