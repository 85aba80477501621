"""Callers who begin and do not go on hold nothing for ever."""

import signal
import threading
import time

import grpc
import pytest

import protos
from cluster import SLOWNESS, wait_until
from infer import infer, make_request, random_batch
from raw_calls import FRONT_DOOR, HalfCall, UnreadCall

TIMEOUT_MS = 500
LARGE = 4096  # tokens: a megabyte each way
HOG_TOKENS = 1024  # replies of a quarter of that, more than a window takes
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


@pytest.fixture(scope="module")
def small_memory(checkpoint, start_cluster):
    """Where an unread reply is ended by its own time only long after others have looked."""
    arguments = [
        *("--reply-timeout-ms", 600000, "--max-held-bytes", HELD_BYTES),
        *("--lease-ms", 6000),
    ]
    with start_cluster(checkpoint(), workers=2, coordinator_args=arguments) as running:
        yield running


def is_served(cluster, batch):
    try:
        infer(cluster, *batch)
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "--max-held-bytes" in error.details()
        return False
    return True


def await_room(cluster, batch, call, start):
    """Others are served once the call's replies, unread since `start` at the earliest, are old."""
    served = is_served(cluster, batch)
    assert not served or time.monotonic() - start >= 10, "there was room, or it was made too soon"
    wait_until(lambda: is_served(cluster, batch), 20, "others are served")
    assert b"--max-held-bytes" in call.wait_end(), "why it was ended"


@pytest.mark.parametrize("method", ["ModelInfer", "ModelStreamInfer"])
def test_caller_that_reads_nothing_makes_room_for_others(small_memory, rng, method):
    """Its connection is well and stays so: nothing but the need of others ends it so soon."""
    batch = random_batch(small_memory.checkpoint.spec, rng, LARGE)
    assert is_served(small_memory, batch)
    message = message_of(small_memory, rng, LARGE)
    start = time.monotonic()
    call = UnreadCall(small_memory.port, FRONT_DOOR + method, message)
    try:
        call.wait_begun()
        await_room(small_memory, batch, call, start)
    finally:
        call.close()


def test_replies_behind_one_that_is_not_read_make_room_too(small_memory, rng):
    batch = random_batch(small_memory.checkpoint.spec, rng, LARGE)
    messages = [message_of(small_memory, rng, tokens) for tokens in (HOG_TOKENS // 2, LARGE)]
    answered = 'epserve_requests_total{outcome="ok"}'
    before = small_memory.metrics()[answered]
    start = time.monotonic()
    call = UnreadCall(small_memory.port, FRONT_DOOR + "ModelStreamInfer", *messages)
    try:
        wait_until(lambda: small_memory.metrics()[answered] == before + 2, 10, "both are answered")
        await_room(small_memory, batch, call, start)
    finally:
        call.close()


def test_reply_that_others_need_no_room_of_is_left_alone(small_memory, rng):
    message = message_of(small_memory, rng, LARGE)
    call = UnreadCall(small_memory.port, FRONT_DOOR + "ModelInfer", message)
    try:
        call.wait_begun()
        end = time.monotonic() + 2
        while time.monotonic() < end:
            assert is_served(small_memory, random_batch(small_memory.checkpoint.spec, rng, 3))
        reply = protos.inference.ModelInferResponse.FromString(call.read_answer())
    finally:
        call.close()
    assert len(reply.raw_output_contents[0]) > 65536


class Hog(threading.Thread):
    """Opens a call that it does not read, and as soon as that has ended another."""

    def __init__(self, port, message, stopped):
        super().__init__()
        self.port, self.message, self.stopped = port, message, stopped
        self.opened = 0

    def run(self):
        while not self.stopped.is_set():
            call = UnreadCall(self.port, FRONT_DOOR + "ModelInfer", self.message)
            try:
                while not call.has_ended() and not self.stopped.wait(0.05):
                    pass
            finally:
                call.close()
            self.opened += 1


def test_callers_that_open_unread_calls_anew_do_not_lock_others_out(small_memory, rng):
    batch = random_batch(small_memory.checkpoint.spec, rng, HOG_TOKENS)
    message = message_of(small_memory, rng, HOG_TOKENS)
    stopped = threading.Event()
    hogs = [Hog(small_memory.port, message, stopped) for _ in range(16)]
    for hog in hogs:
        hog.start()
    try:
        for _ in range(2):
            wait_until(lambda: not is_served(small_memory, batch), 20, "they hold all there is")
            wait_until(lambda: is_served(small_memory, batch), 30, "others are served in between")
    finally:
        stopped.set()
        for hog in hogs:
            hog.join()
    assert sum(hog.opened for hog in hogs) > len(hogs), "they come back"
