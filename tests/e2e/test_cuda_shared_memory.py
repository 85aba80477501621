"""CUDA shared memory at a cluster on CPUs, whose workers can reach none: clear errors that name who
and why, and nothing else disturbed. With GPUs: tests/gpu/cuda_shared_memory.py."""

import subprocess
import time

import grpc
import pytest

import protos
from checkpoints import relative_error
from cluster import program
from infer import infer, random_batch
from regions import Region

WORKERS = 2
ARGUMENTS = ["--allow-client-shm", "--lease-ms", 1000]
HANDLE = bytes(range(64))


@pytest.fixture(scope="module")
def cluster(checkpoint, start_cluster):
    with start_cluster(checkpoint(), workers=WORKERS, coordinator_args=ARGUMENTS) as running:
        yield running


def registration(name="gpu", handle=HANDLE, byte_size=4096, device=0):
    return protos.inference.CudaSharedMemoryRegisterRequest(
        name=name, raw_handle=handle, device_id=device, byte_size=byte_size
    )


def refused(cluster, request, code):
    with pytest.raises(grpc.RpcError) as caught:
        cluster.front_door.CudaSharedMemoryRegister(request, timeout=20)
    assert caught.value.code() == code, caught.value.details()
    return caught.value.details()


def listed(cluster):
    request = protos.inference.CudaSharedMemoryStatusRequest()
    return list(cluster.front_door.CudaSharedMemoryStatus(request, timeout=10).regions)


def test_workers_without_a_gpu_refuse_a_region_saying_who_and_what_to_do(cluster):
    told = refused(cluster, registration(), grpc.StatusCode.FAILED_PRECONDITION)
    assert "region 'gpu' is not open at rank 0 (worker " in told
    assert "host backend has no GPU" in told
    assert "use system shared memory" in told
    assert not listed(cluster)
    refused(cluster, registration(), grpc.StatusCode.FAILED_PRECONDITION)  # The name is free again.


@pytest.mark.parametrize(
    "request_fields",
    [{"handle": HANDLE[:63]}, {"handle": HANDLE + b"x"}, {"byte_size": 0}, {"device": -1}],
)
def test_malformed_registration_is_an_error_of_the_callers(cluster, request_fields):
    refused(cluster, registration(**request_fields), grpc.StatusCode.INVALID_ARGUMENT)


def test_name_of_a_system_region_is_taken(cluster):
    with Region(cluster, 64, name="both"):
        refused(cluster, registration("both"), grpc.StatusCode.ALREADY_EXISTS)


def test_region_that_is_not_registered_is_not_found(cluster, rng):
    batch = random_batch(cluster.checkpoint.spec, rng, 4)
    request = protos.inference.ModelInferRequest(model_name=cluster.checkpoint.name)
    tensor = request.inputs.add(
        name="hidden_states", datatype="FP32", shape=list(batch[0].shape)
    )
    tensor.parameters["shared_memory_region"].string_param = "gpu"
    tensor.parameters["shared_memory_byte_size"].int64_param = batch[0].nbytes
    for name, array in (("topk_ids", batch[1]), ("topk_weights", batch[2])):
        datatype = "FP32" if array.dtype.kind == "f" else "INT32"
        request.inputs.add(name=name, datatype=datatype, shape=list(array.shape))
        request.raw_input_contents.append(array.tobytes())
    with pytest.raises(grpc.RpcError) as caught:
        cluster.front_door.ModelInfer(request, timeout=10)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert "gpu" in caught.value.details()


def test_requests_wait_while_regions_are_tried_and_none_fails(cluster):
    load = subprocess.Popen(
        [
            program("epserve"), "bench", "--server", cluster.target, "--tokens", "8",
            "--concurrency", "4", "--duration", "2", "--json",
        ],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    tried = 0
    while load.poll() is None:
        refused(cluster, registration(), grpc.StatusCode.FAILED_PRECONDITION)
        tried += 1
    _, errors = load.communicate(timeout=20)
    assert load.returncode == 0, errors
    assert tried > 10


def test_registrations_without_pause_keep_no_request_from_being_served(cluster, rng):
    batch = random_batch(cluster.checkpoint.spec, rng, 4)
    flood, answered, longest_s = [], 0, 0.0
    last = time.monotonic()
    until = last + 1.5
    while time.monotonic() < until:
        while len(flood) < 32:  # One is always waiting behind another.
            request = registration(f"gpu{answered}-{len(flood)}-{time.monotonic_ns()}")
            flood.append(cluster.front_door.CudaSharedMemoryRegister.future(request, timeout=20))
        infer(cluster, *batch)
        answered += 1
        longest_s = max(longest_s, time.monotonic() - last)
        last = time.monotonic()
        flood = [call for call in flood if not call.done()]
    for call in flood:
        call.exception(20)
    assert answered > 1
    assert longest_s < 1.0, "requests waited for the flood to end"


def test_worker_lost_while_it_is_asked_makes_the_registration_unavailable(cluster, rng):
    cluster.workers[1].pause()
    call = cluster.front_door.CudaSharedMemoryRegister.future(registration(), timeout=30)
    with pytest.raises(grpc.RpcError) as caught:
        call.result(25)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "rank 1" in caught.value.details() or "lost" in caught.value.details()
    cluster.workers[1].resume()
    cluster.wait_ready()
    assert not listed(cluster)
    batch = random_batch(cluster.checkpoint.spec, rng, 4)
    assert relative_error(infer(cluster, *batch), cluster.checkpoint.ffn(*batch)) <= 1e-5


def test_registration_while_the_service_is_not_ready_is_unavailable(checkpoint, start_cluster):
    with start_cluster(checkpoint(), workers=WORKERS, coordinator_args=ARGUMENTS) as cluster:
        cluster.workers[0].kill()
        cluster.wait_not_ready()
        told = refused(cluster, registration(), grpc.StatusCode.UNAVAILABLE)
        assert "not ready" in told


def test_bench_says_why_there_is_no_cuda_memory(cluster):
    done = subprocess.run(
        [
            program("epserve"), "bench", "--server", cluster.target, "--tokens", "8",
            "--requests", "10", "--shared-memory", "cuda",
        ],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "cuda memory:" in done.stderr or "no GPU" in done.stderr
