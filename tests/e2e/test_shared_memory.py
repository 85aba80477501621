"""Tensors in clients' shared memory, read and written there by the workers: results, which way the
bytes went, and clients that use their memory badly while a request is under way."""

import contextlib
import signal
import subprocess
import sys
import threading

import grpc
import numpy as np
import pytest

from checkpoints import relative_error
from cluster import wait_until
from infer import TOLERANCE, infer, random_batch
from regions import Region, open_descriptors, region_request

WORKERS = 2
# More than are a single worker's, so that each has rows.
TOKENS = 96
ARGUMENTS = ["--allow-client-shm", "--lease-ms", 5000]


@pytest.fixture(scope="module")
def cluster(checkpoint, start_cluster):
    with start_cluster(checkpoint(), workers=WORKERS, coordinator_args=ARGUMENTS) as running:
        yield running


@contextlib.contextmanager
def paused(worker):
    """The worker does nothing meanwhile; its lease is longer than that."""
    worker.pause()
    try:
        yield
    finally:
        worker.resume()


def region_bytes(cluster):
    values = cluster.metrics()
    return {
        way: values[f'epserve_region_bytes_total{{way="{way}"}}'] for way in ("direct", "copied")
    }


def in_flight(cluster, count=1):
    cluster.wait_status(lambda s: s.batches_in_flight == count, 10, f"{count} batches in flight")


def failure_of(call):
    with pytest.raises(grpc.RpcError) as caught:
        call.result(20)
    return caught.value


def check(cluster, region, offset, batch):
    """The region holds the batch's output."""
    got = region.read(offset, batch[0].dtype, batch[0].shape)
    want = cluster.checkpoint.ffn(*batch)
    assert relative_error(got, want) <= TOLERANCE[batch[0].dtype]


def run(cluster, batch, source, target):
    request = region_request(cluster.checkpoint.name, batch, source, target)
    response = cluster.front_door.ModelInfer(request, timeout=20)
    assert list(response.raw_output_contents) == [b""]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("tokens", [1, 7, 200])
def test_workers_read_rows_from_a_region_and_write_them_to_one(cluster, rng, dtype, tokens):
    batch = random_batch(cluster.checkpoint.spec, rng, tokens, dtype)
    size = batch[0].nbytes
    before = region_bytes(cluster)
    with Region(cluster, size + 24) as source, Region(cluster, size + 48, offset=0) as target:
        run(cluster, batch, (source, 24), (target, 8))
        check(cluster, target, 8, batch)
        assert not target.read(0, np.uint8, 8).any(), "before its window"
        assert not target.read(size + 8, np.uint8, 40).any(), "past its window"
    after = region_bytes(cluster)
    assert after["direct"] - before["direct"] == 2 * size
    assert after["copied"] == before["copied"]


@pytest.mark.parametrize("shift", [0, 4, -4, 64])
def test_output_over_the_input_is_right_wherever_it_lies(cluster, rng, shift):
    batch = random_batch(cluster.checkpoint.spec, rng, 64)
    with Region(cluster, batch[0].nbytes + 128) as region:
        run(cluster, batch, (region, 64), (region, 64 + shift))
        check(cluster, region, 64 + shift, batch)


@pytest.mark.parametrize("shift_rows", [0, -8])
def test_output_of_one_worker_never_replaces_rows_that_another_has_yet_to_read(
    cluster, rng, shift_rows
):
    spec = cluster.checkpoint.spec
    hidden, ids, weights = random_batch(spec, rng, TOKENS)
    # No row leaves its worker, so that the second worker ends while the first has not begun.
    ids[: TOKENS // 2] = rng.permutation(spec.experts // 2)[: spec.topk]
    ids[TOKENS // 2 :] = spec.experts // 2 + rng.permutation(spec.experts // 2)[: spec.topk]
    row_bytes = hidden.nbytes // TOKENS
    first = next(w.worker_id for w in cluster.status().workers if w.rank == 0)
    with Region(cluster, hidden.nbytes + 16 * row_bytes) as region:
        target = (8 + shift_rows) * row_bytes
        request = region_request(
            cluster.checkpoint.name,
            (hidden, ids, weights),
            (region, 8 * row_bytes),
            (region, target),
        )
        last_row = (target + (TOKENS - 1) * row_bytes, np.float32, (spec.hidden,))
        before = region.read(*last_row)
        with paused(cluster.workers[int(first[1:])]):
            call = cluster.front_door.ModelInfer.future(request, timeout=20)
            wait_until(lambda: (region.read(*last_row) != before).any(), 10, "the second has ended")
            assert not call.done()
        call.result(20)
        check(cluster, region, target, (hidden, ids, weights))


def test_two_names_on_one_key_reach_the_same_bytes(cluster, rng):
    batch = random_batch(cluster.checkpoint.spec, rng, TOKENS)
    size = batch[0].nbytes
    with Region(cluster, 2 * size) as first:
        with Region(cluster, size, key=first.key, offset=size) as second:
            run(cluster, batch, (first, 0), (second, 0))
        check(cluster, first, size, batch)


def test_through_messages_the_coordinator_copies(checkpoint, start_cluster, rng):
    arguments = [*ARGUMENTS, "--row-transport", "messages"]
    with start_cluster(checkpoint(), workers=WORKERS, coordinator_args=arguments) as cluster:
        batch = random_batch(cluster.checkpoint.spec, rng, TOKENS)
        size = batch[0].nbytes
        with Region(cluster, size) as source, Region(cluster, size) as target:
            run(cluster, batch, (source, 0), (target, 0))
            check(cluster, target, 0, batch)
        assert region_bytes(cluster) == {"direct": 0, "copied": 2 * size}


def test_region_unlinked_by_its_client_still_serves(cluster, rng):
    batch = random_batch(cluster.checkpoint.spec, rng, TOKENS)
    with Region(cluster, batch[0].nbytes) as region:
        request = region_request(cluster.checkpoint.name, batch, (region, 0))
        content = region.path.read_bytes()
        region.path.unlink()
        region.path.write_bytes(b"another object of that name")
        response = cluster.front_door.ModelInfer(request, timeout=20)
        got = np.frombuffer(response.raw_output_contents[0], np.float32).reshape(batch[0].shape)
        assert relative_error(got, cluster.checkpoint.ffn(*batch)) <= 1e-5
        assert content == batch[0].tobytes()


# ---- edges

HALF, MOST = 1 << 63, (1 << 64) - 1
OBJECT_BYTES = 8192


@pytest.mark.parametrize(
    "offset,size,fits",
    [
        (0, OBJECT_BYTES, True), (OBJECT_BYTES - 1, 1, True), (0, 1, True),
        (0, 0, False), (0, OBJECT_BYTES + 1, False), (1, OBJECT_BYTES, False),
        (OBJECT_BYTES, 1, False), (HALF - 1, 1, False), (HALF, 1, False), (HALF, HALF, False),
        (1, HALF, False), (MOST, 1, False), (1, MOST, False), (MOST, MOST, False),
        (MOST - OBJECT_BYTES + 1, OBJECT_BYTES, False),
    ],
)  # fmt: skip
def test_registration_is_held_to_the_object_at_every_edge(cluster, offset, size, fits):
    with Region(cluster, OBJECT_BYTES) as whole:
        register = lambda: Region(cluster, size, key=whole.key, offset=offset)
        if fits:
            register().unregister()
            return
        with pytest.raises(grpc.RpcError) as caught:
            register()
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert whole.key not in caught.value.details()


@pytest.mark.parametrize("of_output", [False, True])
def test_windows_are_held_to_the_region_at_every_edge(cluster, rng, of_output):
    batch = random_batch(cluster.checkpoint.spec, rng, TOKENS)
    size = batch[0].nbytes
    with Region(cluster, size + 100) as region:
        place = (region, 0)
        request = region_request(
            cluster.checkpoint.name, batch, *((None, place) if of_output else (place, None))
        )
        tensor = request.outputs[0] if of_output else request.inputs[0]

        def code(offset, byte_size=size, field="int64_param"):
            setattr(tensor.parameters["shared_memory_offset"], field, offset)
            tensor.parameters["shared_memory_byte_size"].int64_param = byte_size
            try:
                cluster.front_door.ModelInfer(request, timeout=20)
            except grpc.RpcError as error:
                return error.code().name
            return "OK"

        assert [code(offset) for offset in (0, 1, 99, 100)] == ["OK"] * 4
        bad = [code(offset) for offset in (101, size + 100, HALF - 1, -1, -HALF)]
        bad += [code(offset, field="uint64_param") for offset in (0, HALF, MOST)]
        bad += [code(0, byte_size) for byte_size in (0, -1, size - 1, size + 101, HALF - 1, -HALF)]
        assert set(bad) == {"INVALID_ARGUMENT"}
        assert code(HALF - size, size) == "INVALID_ARGUMENT"


# ---- memory that goes away under a request


def test_region_truncated_during_a_request_fails_that_request_alone(cluster, rng):
    epoch = cluster.status().epoch
    batch = random_batch(cluster.checkpoint.spec, rng, TOKENS)
    with Region(cluster, batch[0].nbytes) as region:
        with paused(cluster.workers[0]):
            request = region_request(cluster.checkpoint.name, batch, (region, 0))
            call = cluster.front_door.ModelInfer.future(request, timeout=20)
            in_flight(cluster)
            region.truncate(16)
        error = failure_of(call)
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "truncated" in error.details() and region.name in error.details()
    assert relative_error(infer(cluster, *batch), cluster.checkpoint.ffn(*batch)) <= 1e-5
    assert cluster.status().epoch == epoch, "no worker had to start anew"


def test_output_region_truncated_during_a_request_fails_it_and_does_not_grow(cluster, rng):
    epoch = cluster.status().epoch
    batch = random_batch(cluster.checkpoint.spec, rng, TOKENS)
    with Region(cluster, batch[0].nbytes) as region:
        with paused(cluster.workers[0]):
            request = region_request(cluster.checkpoint.name, batch, target=(region, 0))
            call = cluster.front_door.ModelInfer.future(request, timeout=20)
            in_flight(cluster)
            region.truncate(16)
        assert failure_of(call).code() == grpc.StatusCode.INVALID_ARGUMENT
        assert region.path.stat().st_size == 16
    assert cluster.status().epoch == epoch


def test_truncated_region_does_not_spoil_the_requests_merged_with_it(
    checkpoint, start_cluster, rng
):
    arguments = [*ARGUMENTS, "--batch-window-us", 1_000_000]
    with start_cluster(checkpoint(), workers=WORKERS, coordinator_args=arguments) as cluster:
        bad, good, far = (random_batch(cluster.checkpoint.spec, rng, 5) for _ in range(3))
        size = bad[0].nbytes
        with Region(cluster, size) as source, Region(cluster, 2 * size) as other:
            request = region_request(cluster.checkpoint.name, bad, (source, 0))
            failing = cluster.front_door.ModelInfer.future(request, timeout=20)
            cluster.wait_status(lambda s: s.queued_requests == 1, 5, "it waits for others")
            source.truncate(0)
            request = region_request(cluster.checkpoint.name, far, (other, 0), (other, size))
            placed = cluster.front_door.ModelInfer.future(request, timeout=20)
            got = infer(cluster, *good)
            assert failure_of(failing).code() == grpc.StatusCode.INVALID_ARGUMENT
            placed.result(20)
            check(cluster, other, size, far)
            assert relative_error(got, cluster.checkpoint.ffn(*good)) <= 1e-5


def test_region_unregistered_in_use_serves_its_last_request_and_is_closed_then(cluster, rng):
    batch = random_batch(cluster.checkpoint.spec, rng, TOKENS)
    size = batch[0].nbytes
    with Region(cluster, 2 * size) as region:
        run(cluster, batch, (region, 0), (region, size))  # Now the workers have it open.
        assert all(open_descriptors(w.pid, region) == 1 for w in cluster.workers.values())
        region.write(size, np.zeros_like(batch[0]))
        with paused(cluster.workers[0]):
            request = region_request(cluster.checkpoint.name, batch, (region, 0), (region, size))
            call = cluster.front_door.ModelInfer.future(request, timeout=20)
            in_flight(cluster)
            unregistered = region.unregister_later()
            wait_until(lambda: not region.is_listed(), 5, "the name is gone")
            refused = cluster.front_door.ModelInfer.future(request, timeout=20)
            assert failure_of(refused).code() == grpc.StatusCode.NOT_FOUND
            assert not unregistered.done()
        call.result(20)
        unregistered.result(20)
        check(cluster, region, size, batch)
        pids = [cluster.coordinator.pid, *(w.pid for w in cluster.workers.values())]
        wait_until(
            lambda: not any(open_descriptors(pid, region) for pid in pids), 5, "nobody has it open"
        )


def test_unregister_waits_for_a_request_whose_caller_has_gone(cluster, rng):
    batch = random_batch(cluster.checkpoint.spec, rng, TOKENS)
    with Region(cluster, batch[0].nbytes) as region:
        with paused(cluster.workers[0]):
            request = region_request(cluster.checkpoint.name, batch, (region, 0), (region, 0))
            call = cluster.front_door.ModelInfer.future(request, timeout=20)
            in_flight(cluster)
            call.cancel()
            unregistered = region.unregister_later()
            wait_until(lambda: not region.is_listed(), 5, "the name is gone")
            assert cluster.status().batches_in_flight == 1
            assert not unregistered.done()
        unregistered.result(20)


CALLER = """
import sys
sys.path.insert(0, {support!r})
import protos
channel = protos.insecure_channel({target!r})
request = protos.inference.ModelInferRequest.FromString(bytes.fromhex({request!r}))
door = protos.front_door(channel)
if {stream}:
    for _ in door.ModelStreamInfer(iter([request] * 3)): pass
else:
    door.ModelInfer(request)
"""


@pytest.mark.parametrize("stream", [False, True])
def test_killed_caller_leaves_nothing_behind(cluster, rng, stream):
    batch = random_batch(cluster.checkpoint.spec, rng, TOKENS)
    with Region(cluster, batch[0].nbytes) as region:
        request = region_request(cluster.checkpoint.name, batch, (region, 0), (region, 0))
        script = CALLER.format(
            support=[p for p in sys.path if p.endswith("support")][0],
            target=cluster.target,
            request=request.SerializeToString().hex(),
            stream=stream,
        )
        with paused(cluster.workers[0]):
            with subprocess.Popen([sys.executable, "-c", script]) as caller:
                in_flight(cluster, 2 if stream else 1)
                caller.send_signal(signal.SIGKILL)
        region.unregister()
        cluster.wait_status(
            lambda s: not s.batches_in_flight and not s.queued_requests, 10, "nothing is left"
        )
        assert open_descriptors(cluster.coordinator.pid, region) == 0
    assert relative_error(infer(cluster, *batch), cluster.checkpoint.ffn(*batch)) <= 1e-5


# ---- workers that go away


def test_worker_killed_during_a_request_gives_its_region_back(checkpoint, start_cluster, rng):
    with start_cluster(checkpoint(), workers=WORKERS, coordinator_args=ARGUMENTS) as cluster:
        batch = random_batch(cluster.checkpoint.spec, rng, TOKENS)
        with Region(cluster, batch[0].nbytes) as region:
            cluster.workers[0].pause()
            request = region_request(cluster.checkpoint.name, batch, (region, 0), (region, 0))
            call = cluster.front_door.ModelInfer.future(request, timeout=20)
            in_flight(cluster)
            cluster.workers[0].kill()
            assert failure_of(call).code() == grpc.StatusCode.UNAVAILABLE
            region.unregister()


def test_worker_paused_past_its_lease_writes_nothing_late(checkpoint, start_cluster, rng):
    arguments = ["--allow-client-shm", "--lease-ms", 1000]
    with start_cluster(checkpoint(), workers=WORKERS, coordinator_args=arguments) as cluster:
        batch = random_batch(cluster.checkpoint.spec, rng, TOKENS)
        with Region(cluster, batch[0].nbytes) as region:
            with paused(cluster.workers[0]):
                request = region_request(cluster.checkpoint.name, batch, target=(region, 0))
                call = cluster.front_door.ModelInfer.future(request, timeout=20)
                assert failure_of(call).code() == grpc.StatusCode.UNAVAILABLE
                region.unregister()
                pattern = np.full(batch[0].nbytes, 0x5A, np.uint8)
                region.write(0, pattern)
            cluster.wait_ready()
            assert (region.read(0, np.uint8, pattern.shape) == 0x5A).all()


def test_many_callers_with_regions_of_their_own_get_their_own_results(cluster, rng):
    batches = [random_batch(cluster.checkpoint.spec, rng, 9) for _ in range(8)]
    errors = []

    def call(batch):
        try:
            size = batch[0].nbytes
            with Region(cluster, 2 * size) as region:
                for _ in range(20):
                    region.write(size, np.zeros_like(batch[0]))
                    run(cluster, batch, (region, 0), (region, size))
                    check(cluster, region, size, batch)
        except Exception as error:  # pylint: disable=broad-except
            errors.append(error)

    threads = [threading.Thread(target=call, args=(batch,)) for batch in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
