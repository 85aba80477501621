"""Every worker is restarted, one after another, while requests come in at half of what is served
without that: none hangs, none is answered wrong, and a client that retries sees no failure."""

import json
import subprocess

from checkpoints import relative_error
from cluster import SLOWNESS, program
from infer import infer, random_batch

WORKERS = 3
TOKENS = 32
# What a bench waits for one answer, seconds. An outage is far shorter.
TIMEOUT_S = 20


def bench(cluster, *flags):
    return subprocess.Popen(
        [
            *(program("epserve"), "bench", f"--server={cluster.target}", f"--tokens={TOKENS}"),
            *("--dtype=fp32", f"--timeout={TIMEOUT_S * SLOWNESS}", "--warmup=0"),
            *("--allow-errors", "--json"),
            *flags,
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def report(running, timeout_s):
    output, errors = running.communicate(timeout=timeout_s * SLOWNESS)
    assert running.returncode == 0, errors
    return json.loads(output)


def wait_answers(cluster, count):
    """Waits until `count` more requests have been answered with a result."""
    least = cluster.status().requests_ok + count
    cluster.wait_status(lambda s: s.requests_ok >= least, 20, f"{count} more answers")


def restart(cluster, index):
    """SIGTERM, and another process in its place; returns once that one serves."""
    epoch = cluster.status().epoch
    assert cluster.workers[index].terminate() == 0
    pid = cluster.start_worker(index).pid
    cluster.wait_status(
        lambda s: s.state == "serving" and s.epoch > epoch and pid in [w.pid for w in s.workers],
        10,
        f"the new worker {index} serves",
    )


def test_rolling_restart_under_half_of_the_load_is_hidden_by_retries(
    checkpoint, start_cluster, rng
):
    served = checkpoint(experts=12, topk=3)
    with start_cluster(served, workers=WORKERS) as cluster:
        capacity = report(bench(cluster, "--concurrency=4", "--duration=1"), 30)
        assert capacity["succeeded"] == capacity["requests"], capacity
        # Two callers, alike but for their retries, ask for half of that together.
        rate = capacity["requests_per_second"] / 4
        load = (f"--rate={rate:.1f}", f"--duration={10 * SLOWNESS}")
        callers = [bench(cluster, *load, f"--attempts={attempts}") for attempts in (1, 50)]
        try:
            wait_answers(cluster, int(rate / 2))
            for index in range(WORKERS):
                restart(cluster, index)
                wait_answers(cluster, int(rate / 2))
            plain, retrying = (report(caller, 10 + TIMEOUT_S) for caller in callers)
        finally:
            for caller in callers:
                caller.kill()
                caller.communicate()
        print(f"of {plain['requests']} without retries: {plain['errors']}")
        # What found the queue full, where this machine is slower than it was while its capacity was
        # measured, says RESOURCE_EXHAUSTED. Whatever does not end in time: DEADLINE_EXCEEDED.
        codes = {name.lower() for name in plain["errors"]}
        assert "unavailable" in codes, plain["errors"]
        assert codes <= {"unavailable", "resource_exhausted"}, plain["errors"]
        assert plain["succeeded"] > plain["requests"] / 4, plain
        assert retrying["errors"] == {} and retrying["succeeded"] == retrying["requests"], retrying
        assert retrying["requests"] > 0.9 * plain["requests"], "its load came as fast"
        batch = random_batch(served.spec, rng, TOKENS)
        assert relative_error(infer(cluster, *batch), served.ffn(*batch)) <= 1e-5
