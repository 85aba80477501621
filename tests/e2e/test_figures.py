"""What the service must reach: a worker's memory, and its own part of a request's time."""

import json
import pathlib
import resource
import time

import pytest

from checkpoints import Checkpoint, Spec
from cluster import SLOWNESS, run_program
from infer import infer, random_batch


@pytest.fixture
def made(tmp_path):
    """make(**flags) runs `epserve make-checkpoint`."""

    def make(**flags):
        directory = tmp_path / "made"
        words = [word for k, v in flags.items() for word in (f"--{k.replace('_', '-')}", v)]
        result = run_program("epserve", "make-checkpoint", "--output", directory, *words)
        assert result.returncode == 0, result.stderr
        return Checkpoint(directory, Spec(), {})

    return make


def memory(pid, file, field):
    """A field of /proc/<pid>/<file>, in bytes."""
    for line in pathlib.Path(f"/proc/{pid}/{file}").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {field} of process {pid}")


# Small weights under the largest requests that the defaults admit, as many at once as fill every
# slot; and larger weights, where a load's passing needs count.
@pytest.mark.parametrize(
    "shape, workers, max_tokens, requests, concurrency, least_mib",
    [
        (dict(dtype="bf16", experts=32), 4, 4096, 12, 4, 96),
        (dict(dtype="fp32", hidden=1024, intermediate=2048, experts=32, layers=1), 2, 1024, 4, 1,
         200),
    ],
)  # fmt: skip
def test_worker_holds_its_weights_its_heap_and_at_most_a_tenth_more(
    made, start_cluster, shape, workers, max_tokens, requests, concurrency, least_mib
):
    served = made(architecture="mixtral", topk=2, **shape)
    limit = ["--max-batch-tokens", max_tokens]
    options = dict(coordinator_args=limit, worker_args=limit)
    with start_cluster(served, workers=workers, **options) as cluster:
        result = run_program(
            "epserve", "bench", "--server", cluster.target, "--tokens", max_tokens, "--requests",
            requests, "--concurrency", concurrency, "--dtype", "fp32", "--warmup", 0, "--json",
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        for worker in cluster.status().workers:
            assert worker.weight_bytes >= least_mib << 20
            planned = worker.weight_bytes + worker.heap_bytes
            # Proportional: a heap, which every worker maps, a library, and the coordinator's row
            # arena count once in all. The last two are no worker's own, and small beside weights.
            share = memory(worker.pid, "smaps_rollup", "Pss")
            own_peak = (
                memory(worker.pid, "status", "VmHWM")
                - memory(worker.pid, "status", "RssFile")
                - memory(worker.pid, "status", "RssShmem")
            )
            print(
                f"{worker.worker_id}: weights {worker.weight_bytes >> 20} MiB, heap "
                f"{worker.heap_bytes >> 20} MiB, share {share >> 20} MiB, peak of its own "
                f"{own_peak >> 20} MiB"
            )
            if worker.weight_bytes >= 200 << 20:
                assert share <= 1.1 * planned
            assert own_peak + worker.heap_bytes <= 1.1 * planned
            resident = memory(worker.pid, "status", "VmRSS")
            assert abs(worker.resident_bytes - resident) <= 0.1 * resident


def test_overhead_of_a_small_request_is_small(made, start_cluster):
    # Experts so small that a request hardly waits for the peers' turns on few cores.
    served = made(architecture="mixtral", dtype="bf16", hidden=512, intermediate=16, experts=16,
                  topk=2, layers=1)  # fmt: skip
    with start_cluster(served, workers=4) as cluster:
        result = run_program(
            "epserve", "bench", "--server", cluster.target, "--tokens", 64, "--concurrency", 1,
            "--requests", 300, "--warmup", 50, "--json",
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        figures = json.loads(result.stdout)
        print(json.dumps(figures))
        # The aim is 1 ms on a quiet machine. What the machine takes now for the bare gRPC of such a
        # request says what that is here: about 6 times that, where a timer or a poll on the path
        # would add 20 times as much.
        floors = run_program(
            "epserve-microbench", "rpc", "--workers", 4, "--iterations", 500, "--requests", 100,
            "--inline-bytes", 1024, "--inline-iterations", 1, "--json",
        )  # fmt: skip
        assert floors.returncode == 0, floors.stderr
        tcp = json.loads(floors.stdout)["tcp"]
        floor_us = tcp["unary"]["round_trip_us_p50"] + tcp["all_workers_us_p50"]
        print(f"floor {floor_us:.0f} us")
        assert 0 < figures["overhead_us"]["p50"] <= 25 * floor_us


@pytest.mark.skipif(SLOWNESS != 1, reason="a sanitizer brings its own allocator")
def test_coordinator_keeps_the_memory_of_one_large_message_for_the_next(
    checkpoint, start_cluster, rng
):
    """Memory that is given back comes again page by page, which takes as long as the copying."""
    served = checkpoint(hidden=1024, intermediate=32, num_moe_layers=1)
    limit = ["--max-batch-tokens", 2048]
    with start_cluster(
        served, workers=2, coordinator_args=limit, worker_args=limit
    ) as cluster:
        batch = random_batch(served.spec, rng, 2048)

        def page_faults():
            stat = pathlib.Path(f"/proc/{cluster.coordinator.pid}/stat").read_text()
            return int(stat.rsplit(")", 1)[1].split()[7])

        def send(count):
            for _ in range(count):
                infer(cluster, *batch)
                time.sleep(0.1)  # As callers do that have something else to do in between.

        send(4)
        before = page_faults()
        send(10)
        per_request = (page_faults() - before) / 10
        pages = batch[0].nbytes / 4096
        print(f"{per_request:.0f} page faults a request of {pages:.0f} pages")
        assert per_request < 0.3 * pages


@pytest.mark.skipif(SLOWNESS != 1, reason="a sanitizer brings its own allocator")
def test_command_keeps_the_memory_of_one_large_reply_for_the_next(checkpoint, start_cluster):
    """The first of many requests bring their memory; of what comes with more, little is new."""
    served = checkpoint(hidden=1024, intermediate=32, num_moe_layers=1)
    tokens = 2048
    limit = ["--max-batch-tokens", tokens]
    with start_cluster(
        served, workers=2, coordinator_args=limit, worker_args=limit
    ) as cluster:

        def page_faults(requests):
            before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt
            # One every 0.1 s, as of callers that have something else to do in between.
            done = run_program(
                "epserve", "bench", "--server", cluster.target, "--tokens", tokens, "--rate", 10,
                "--requests", requests, "--dtype", "fp32", "--warmup", 4, "--json",
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout)["succeeded"] == requests
            return resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt - before

        few = page_faults(5)
        per_request = (page_faults(25) - few) / 20
        pages = tokens * served.spec.hidden * 4 / 4096
        print(f"{per_request:.0f} page faults a request of {pages:.0f} pages")
        assert per_request < 0.3 * pages
