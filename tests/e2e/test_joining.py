"""Who may join a cluster: a worker that differs in what must agree is told so, and ends."""

import os
import re
import resource
import signal

import pytest

from checkpoints import relative_error
from cluster import Program, run_program, wait_until
from infer import infer, random_batch


@pytest.fixture(scope="module")
def cluster(checkpoint, start_cluster):
    with start_cluster(checkpoint(), workers=1) as running:
        yield running


def join(cluster, **changes):
    flags = {
        "checkpoint": cluster.checkpoint.path,
        "cluster-id": cluster.id,
        "coordinator": cluster.target,
        "worker-id": "stranger",
    } | changes
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    return run_program("epserve-worker", *words, timeout_s=20)


def check_refusal(cluster, result, *words):
    assert result.returncode > 0, result
    for word in words:
        assert str(word) in result.stderr
    # Nobody else noticed.
    assert [worker.worker_id for worker in cluster.status().workers] == ["w0"]
    assert cluster.is_ready()


def test_worker_with_another_checkpoint_is_rejected_and_ends(cluster, checkpoint):
    result = join(cluster, checkpoint=checkpoint(experts=12).path)
    check_refusal(cluster, result, "stranger", "checkpoint")


def test_worker_with_other_weights_of_the_same_shape_is_rejected_and_ends(cluster, checkpoint):
    result = join(cluster, checkpoint=checkpoint(seed=2).path)
    check_refusal(cluster, result, "fingerprint", "give both the same checkpoint, weights included")


def test_worker_with_another_number_of_slots_is_rejected_with_both_and_ends(cluster):
    result = join(cluster, slots=5)
    check_refusal(cluster, result, "num_slots 5", "coordinator's 2", "--slots")


def test_worker_with_another_batch_limit_is_rejected_with_both_and_ends(cluster):
    result = join(cluster, **{"max-batch-tokens": 128})
    check_refusal(cluster, result, 128, 4096, "--max-batch-tokens")


def test_worker_of_another_cluster_is_rejected_with_both_and_ends(cluster):
    result = join(cluster, **{"cluster-id": "another"})
    check_refusal(cluster, result, "another", cluster.id)


def test_worker_that_is_told_to_go_while_it_still_starts_ends(cluster, tmp_path):
    never_written = tmp_path / "secret"
    os.mkfifo(never_written)
    worker = Program(
        tmp_path / "worker.log", "epserve-worker",
        "--checkpoint", cluster.checkpoint.path, "--secret-file", never_written,
    )  # fmt: skip
    wait_until(lambda: blocks(worker.pid, signal.SIGTERM), 20, "it has begun to start")
    assert worker.terminate() == 128 + signal.SIGTERM
    assert "ended_while_starting" in worker.log()


def blocks(pid, number):
    with open(f"/proc/{pid}/status") as status:
        blocked = int(re.search(r"SigBlk:\s+(\w+)", status.read()).group(1), 16)
    return blocked >> (number - 1) & 1


def test_worker_raises_its_file_limit(cluster, tmp_path):
    def lower():
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))

    worker = Program(
        tmp_path / "worker.log", "epserve-worker",
        "--checkpoint", cluster.checkpoint.path, "--cluster-id", cluster.id,
        "--coordinator", cluster.target, "--worker-id", "another", preexec_fn=lower,
    )  # fmt: skip
    wait_until(lambda: "another" in [w.worker_id for w in cluster.status().workers], 20, "joined")
    with open(f"/proc/{worker.pid}/limits") as limits:
        soft, hard = re.search(r"Max open files +(\w+) +(\w+)", limits.read()).groups()
    assert worker.terminate() == 0
    assert soft == hard


def test_second_worker_of_one_name_waits_and_does_not_disturb_the_first(
    checkpoint, start_cluster, rng
):
    served = checkpoint()
    with start_cluster(served, workers=1) as cluster:
        batch = random_batch(served.spec, rng, 4)
        epoch = cluster.status().epoch
        first = cluster.workers[0]
        second = Program(
            cluster.directory / "second.log", "epserve-worker",
            "--checkpoint", served.path, "--cluster-id", cluster.id,
            "--coordinator", cluster.target, "--worker-id", "w0",
        )  # fmt: skip
        cluster.programs.append(second)
        turned_away = lambda: cluster.metrics()['epserve_refused_total{reason="worker"}']
        wait_until(lambda: turned_away() > 2, 10, "it has tried again")
        # However often it comes back, the log tells of it once a minute.
        log = cluster.coordinator.log()
        assert log.count("worker_turned_away worker=w0") == 1
        assert log.count("worker_hello worker=w0") == 2
        assert "--worker-id of its own" in second.log()
        assert relative_error(infer(cluster, *batch), served.ffn(*batch)) <= 1e-5
        assert (cluster.status().epoch, first.alive()) == (epoch, True)
        first.kill()
        cluster.wait_status(
            lambda s: s.state == "serving" and s.epoch > epoch, 10, "the second takes over"
        )
        assert [worker.pid for worker in cluster.status().workers] == [second.pid]
        assert relative_error(infer(cluster, *batch), served.ffn(*batch)) <= 1e-5
