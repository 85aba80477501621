"""Callers who begin and do not go on hold nothing for ever."""

import signal
import time

import grpc
import pytest

import protos
from cluster import wait_until
from infer import infer, make_request, random_batch
from raw_calls import FRONT_DOOR, HalfCall, UnreadCall

TIMEOUT_MS = 500
LARGE = 4096  # tokens: a megabyte each way
HELD_BYTES = 3 << 20  # Beside a reply of so many there is no room for another such request.


@pytest.fixture(scope="module")
def cluster(checkpoint, start_cluster):
    arguments = [
        *("--message-timeout-ms", TIMEOUT_MS, "--stream-idle-timeout-ms", TIMEOUT_MS),
        *("--reply-timeout-ms", TIMEOUT_MS, "--max-held-bytes", HELD_BYTES),
        *("--lease-ms", 6000),
    ]
    with start_cluster(checkpoint(), workers=2, coordinator_args=arguments) as running:
        yield running


@pytest.mark.parametrize(
    "method",
    [
        "/inference.GRPCInferenceService/ModelInfer",
        "/inference.GRPCInferenceService/ModelMetadata",
        "/inference.GRPCInferenceService/ModelStreamInfer",
        "/grpc.health.v1.Health/Watch",
    ],
)
def test_half_sent_message_is_given_up_after_its_time(cluster, rng, method):
    start = time.monotonic()
    call = HalfCall(cluster.port, method)
    try:
        trailers = call.wait_end()
    finally:
        call.close()
    assert time.monotonic() - start >= TIMEOUT_MS / 1000
    assert b"timeout-ms" in trailers, "the flag that it may be raised with"
    infer(cluster, *random_batch(cluster.checkpoint.spec, rng, 3))


def test_half_sent_request_counts_as_ended(cluster):
    key = 'epserve_requests_total{outcome="deadline_exceeded"}'
    before = cluster.metrics()[key]
    call = HalfCall(cluster.port, "/inference.GRPCInferenceService/ModelInfer")
    try:
        call.wait_end()
    finally:
        call.close()
    assert cluster.metrics()[key] == before + 1


def test_stream_is_kept_while_its_requests_are_under_way_and_ended_once_idle(cluster, rng):
    request = make_request(cluster.checkpoint.name, *random_batch(cluster.checkpoint.spec, rng, 3))
    sent = []

    def requests():
        sent.append(request)
        yield request
        wait_until(lambda: ended, 30, "the test's end")

    ended = []
    cluster.workers[1].pause()
    try:
        stream = cluster.front_door.ModelStreamInfer(requests())
        cluster.wait_status(lambda s: s.batches_in_flight == 1, 5, "it is under way")
        time.sleep(3 * TIMEOUT_MS / 1000)
        assert stream.is_active()
    finally:
        cluster.workers[1].send(signal.SIGCONT)
    try:
        assert not next(stream).error_message
        with pytest.raises(grpc.RpcError) as caught:
            next(stream)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "--stream-idle-timeout-ms" in caught.value.details()
    finally:
        ended.append(True)


def test_stream_without_requests_is_ended(cluster):
    ended = []

    def requests():
        wait_until(lambda: ended, 30, "the test's end")
        yield protos.inference.ModelInferRequest()

    try:
        with pytest.raises(grpc.RpcError) as caught:
            next(cluster.front_door.ModelStreamInfer(requests()))
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    finally:
        ended.append(True)


def message_of(cluster, rng, num_tokens):
    batch = random_batch(cluster.checkpoint.spec, rng, num_tokens)
    return make_request(cluster.checkpoint.name, *batch).SerializeToString()


def test_reply_that_is_not_read_is_given_up_after_its_time(cluster, rng):
    start = time.monotonic()
    call = UnreadCall(cluster.port, FRONT_DOOR + "ModelInfer", message_of(cluster, rng, LARGE))
    try:
        call.wait_begun()
        trailers = call.wait_end()
    finally:
        call.close()
    assert time.monotonic() - start >= TIMEOUT_MS / 1000
    assert b"--reply-timeout-ms" in trailers, "the flag that it may be raised with"


def test_caller_that_reads_nothing_holds_memory_for_a_while_only(cluster, rng):
    """Its connection is well and stays so: nothing but the call's own time ends it."""
    batch = random_batch(cluster.checkpoint.spec, rng, LARGE)

    def is_served():
        try:
            infer(cluster, *batch)
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "--max-held-bytes" in error.details()
            return False
        return True

    assert is_served()
    call = UnreadCall(cluster.port, FRONT_DOOR + "ModelInfer", message_of(cluster, rng, LARGE))
    try:
        call.wait_begun()
        assert not is_served()
        wait_until(is_served, 10, "others are served")
    finally:
        call.close()
