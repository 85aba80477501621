"""What `epserve bench` leaves where it is interrupted with tensors in shared memory: nothing."""

import contextlib
import signal

import pytest

import protos
from cluster import SHM_DIR, Program, wait_until


@pytest.fixture(scope="module")
def cluster(checkpoint, start_cluster):
    with start_cluster(checkpoint(), workers=2, coordinator_args=["--allow-client-shm"]) as running:
        yield running


def regions(cluster):
    request = protos.inference.SystemSharedMemoryStatusRequest()
    return list(cluster.front_door.SystemSharedMemoryStatus(request, timeout=10).regions)


def objects(program):
    return list(SHM_DIR.glob(f"client-{program.pid}-*"))


@contextlib.contextmanager
def bench(cluster, tmp_path):
    """A bench that would run for a minute, and sends requests from a region of its own."""
    before = cluster.metrics()["epserve_tokens_total"]
    program = Program(
        tmp_path / "bench.log", "epserve", "bench", "--server", cluster.target, "--tokens", 64,
        "--shared-memory", "system", "--duration", 60,
    )  # fmt: skip
    try:
        wait_until(
            lambda: cluster.metrics()["epserve_tokens_total"] > before + 10 * 64, 20, "it runs"
        )
        assert len(regions(cluster)) == 1
        yield program
    finally:
        if program.alive():
            program.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_bench_leaves_no_region_and_no_object(cluster, tmp_path, number):
    with bench(cluster, tmp_path) as program:
        program.send(number)
        assert program.wait(10) == -number
    assert not regions(cluster)
    assert not objects(program)


def test_killed_bench_leaves_its_region_registered_and_no_object(cluster, tmp_path):
    with bench(cluster, tmp_path) as program:
        assert not objects(program)
        program.kill()
    assert len(regions(cluster)) == 1, "the README says so"
    cluster.front_door.SystemSharedMemoryUnregister(
        protos.inference.SystemSharedMemoryUnregisterRequest(), timeout=10
    )
    assert not regions(cluster)
