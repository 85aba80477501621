"""Requests whose output fits no reply, as their rows do no message, for these lie in shared memory:
refused before anything is computed, with what to do."""

import grpc
import numpy as np
import pytest

from checkpoints import relative_error
from cluster import wait_until
from infer import make_request, output_of, random_batch
from regions import Region, region_request

TOKENS = 1200  # of 1024 FP32: 4.7 MiB
MAX_MESSAGE_BYTES = 1 << 20


@pytest.fixture(scope="module")
def cluster(checkpoint, start_cluster):
    limit = ["--max-batch-tokens", TOKENS]
    with start_cluster(
        checkpoint(hidden=1024, intermediate=16, experts=4, topk=2),
        workers=2,
        coordinator_args=[*limit, "--allow-client-shm", "--max-message-bytes", MAX_MESSAGE_BYTES],
        worker_args=limit,
    ) as running:
        yield running


def check_told(told, output_bytes):
    for part in (f"{output_bytes} bytes", "--max-message-bytes 1048576", "shared_memory_region"):
        assert part in told, told


def test_output_that_fits_no_reply_is_refused_and_in_a_region_it_is_answered(cluster, rng):
    batch = random_batch(cluster.checkpoint.spec, rng, TOKENS)
    size = batch[0].nbytes
    refused = 'epserve_requests_total{outcome="invalid_argument"}'
    before = cluster.metrics()
    with Region(cluster, 2 * size) as region:
        request = region_request(cluster.checkpoint.name, batch, (region, 0))
        with pytest.raises(grpc.RpcError) as caught:
            cluster.front_door.ModelInfer(request, timeout=20)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT, caught.value.details()
        check_told(caught.value.details(), size)
        wait_until(
            lambda: cluster.metrics().get(refused, 0) == before.get(refused, 0) + 1, 5, "counted"
        )
        tokens = "epserve_tokens_total"
        assert cluster.metrics()[tokens] == before[tokens], "it was computed all the same"

        request = region_request(cluster.checkpoint.name, batch, (region, 0), (region, size))
        cluster.front_door.ModelInfer(request, timeout=20)
        got = region.read(size, np.float32, batch[0].shape)
        assert relative_error(got, cluster.checkpoint.ffn(*batch)) <= 1e-5


def test_output_that_fits_no_reply_is_an_error_in_its_place_on_a_stream(cluster, rng):
    small = random_batch(cluster.checkpoint.spec, rng, 3)
    batch = random_batch(cluster.checkpoint.spec, rng, TOKENS)
    name = cluster.checkpoint.name
    with Region(cluster, batch[0].nbytes) as region:
        requests = [
            make_request(name, *small, request_id="first"),
            region_request(name, batch, (region, 0), request_id="large"),
            make_request(name, *small, request_id="last"),
        ]
        first, large, last = cluster.front_door.ModelStreamInfer(iter(requests), timeout=20)
    assert large.infer_response.id == "large"
    check_told(large.error_message, batch[0].nbytes)
    for reply in (first, last):
        assert not reply.error_message
        got = output_of(reply.infer_response)
        assert relative_error(got, cluster.checkpoint.ffn(*small)) <= 1e-5


def test_output_just_below_the_limit_is_answered_inline(cluster, rng):
    batch = random_batch(cluster.checkpoint.spec, rng, (MAX_MESSAGE_BYTES - 4096) // 4096)
    with Region(cluster, batch[0].nbytes) as region:
        request = region_request(cluster.checkpoint.name, batch, (region, 0))
        got = output_of(cluster.front_door.ModelInfer(request, timeout=20))
    assert relative_error(got, cluster.checkpoint.ffn(*batch)) <= 1e-5
