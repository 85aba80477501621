"""More connections with calls under way than --max-connections allows: who comes too late is
refused, counted and told of once, and is served as soon as there is a place."""

import grpc
import pytest

from checkpoints import relative_error
from cluster import wait_until
from infer import infer, random_batch
from raw_calls import FRONT_DOOR, HalfCall

MAX_CONNECTIONS = 3
REFUSED = 'epserve_refused_total{reason="max_connections"}'


def test_connections_beyond_the_limit_are_refused_counted_and_logged_once(
    checkpoint, start_cluster, rng
):
    limit = ["--max-connections", MAX_CONNECTIONS]
    with start_cluster(checkpoint(), workers=2, coordinator_args=limit) as cluster:
        batch = random_batch(cluster.checkpoint.spec, rng, 9)
        halves = [
            HalfCall(cluster.port, FRONT_DOOR + "ModelInfer") for _ in range(MAX_CONNECTIONS)
        ]
        try:
            for half in halves:
                half.wait_until_taken()
            for _ in range(5):
                with pytest.raises(grpc.RpcError) as caught:
                    infer(cluster, *batch)
                assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
                assert "too many connections" in caught.value.details()
            assert cluster.metrics()[REFUSED] == 5
            # Neither the workers' streams nor their leases need a place.
            assert cluster.metrics()["epserve_serving"] == 1
            (line,) = [x for x in cluster.coordinator.log().splitlines() if "refused" in x]
            assert "connection_refused peer=ipv4:127.0.0.1:" in line
            assert "--max-connections" in line
        finally:
            for half in halves:
                half.close()
        wait_until(cluster.is_ready, 10, "there is a place again")
        assert relative_error(infer(cluster, *batch), cluster.checkpoint.ffn(*batch)) <= 1e-5
