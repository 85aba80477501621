"""Callers that stop half-way: who does not read answers, and who does not finish a message, costs
the service a bounded amount of memory and nobody else anything."""

import itertools
import pathlib
import time

import pytest

import protos
from checkpoints import relative_error
from cluster import wait_until
from infer import infer, make_request, output_of, random_batch
from raw_calls import FRONT_DOOR, HalfCall

MIB = 1 << 20
REQUESTS = 10_000


@pytest.fixture(scope="module")
def cluster(checkpoint, start_cluster):
    with start_cluster(checkpoint(), workers=2) as running:
        yield running


def resident_bytes(program):
    for line in pathlib.Path(f"/proc/{program.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


def answered(cluster):
    return cluster.metrics()['epserve_requests_total{outcome="ok"}']


def check_others_are_served(cluster, rng):
    batch = random_batch(cluster.checkpoint.spec, rng, 12)
    assert relative_error(infer(cluster, *batch), cluster.checkpoint.ffn(*batch)) <= 1e-5


def test_stream_whose_caller_does_not_read_is_held_up_and_nobody_else(cluster, rng):
    batch = random_batch(cluster.checkpoint.spec, rng, 256)
    want = cluster.checkpoint.ffn(*batch)
    check_others_are_served(cluster, rng)
    memory, before = resident_bytes(cluster.coordinator), answered(cluster)
    sent = itertools.count()
    model = cluster.checkpoint.name
    messages = (
        make_request(model, *batch, request_id=str(i)) for i in range(REQUESTS) if next(sent) >= 0
    )
    total_bytes = REQUESTS * make_request(model, *batch).ByteSize()
    channel = protos.insecure_channel(cluster.target)
    replies = protos.front_door(channel).ModelStreamInfer(messages)

    # It takes requests until its answers are not taken, and then no more.
    seen = [-1.0, 0.0]  # how many were answered, since when

    def stands_still():
        now = answered(cluster)
        if now != seen[0]:
            seen[:] = now, time.monotonic()
        return now > before and time.monotonic() - seen[1] > 1

    wait_until(stands_still, 60, "no more requests are taken")
    assert answered(cluster) - before < REQUESTS / 2
    assert next(sent) < REQUESTS, "the caller is held up"
    grown = resident_bytes(cluster.coordinator) - memory
    assert total_bytes > 256 * MIB
    assert grown < 128 * MIB, f"the coordinator has grown by {grown / MIB:.0f} MiB"
    check_others_are_served(cluster, rng)

    for i, reply in enumerate(itertools.islice(replies, 2000)):
        assert not reply.error_message
        assert reply.infer_response.id == str(i)
        if i % 500 == 0:
            assert relative_error(output_of(reply.infer_response), want) <= 1e-5
    channel.close()  # In the midst of the rest.
    cluster.wait_status(
        lambda s: not s.batches_in_flight and not s.queued_requests, 20, "nothing is left of it"
    )
    check_others_are_served(cluster, rng)


@pytest.mark.parametrize("method", ["ModelInfer", "ModelStreamInfer"])
def test_callers_that_stall_in_a_message_hold_up_nobody(cluster, rng, method):
    batch = random_batch(cluster.checkpoint.spec, rng, 64)
    message = make_request(cluster.checkpoint.name, *batch).SerializeToString()
    memory = resident_bytes(cluster.coordinator)
    # Each has announced 200 MiB, and sent a few KiB.
    calls = [
        HalfCall(cluster.port, FRONT_DOOR + method, 200 * MIB, message[:4096]) for _ in range(200)
    ]
    try:
        for call in calls:
            call.wait_until_taken()
        check_others_are_served(cluster, rng)
        grown = resident_bytes(cluster.coordinator) - memory
        assert grown < 64 * MIB, f"what was announced is not taken: {grown / MIB:.0f} MiB"
        assert cluster.status().queued_requests == 0
    finally:
        for call in calls:
            call.close()
    check_others_are_served(cluster, rng)

